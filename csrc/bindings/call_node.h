// A node of autograd's graph for a call that knows its gradients.
#pragma once

#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

#include "bindings/tensors.h"

namespace batchnorm_ext::bindings {

using torch::autograd::variable_list;

// Does for one kind of call what torch::autograd::Function does for any, without its lists and dictionaries, which take
// longer than a small batch norm. A Call is a plain struct with
//   name                             of the node
//   enum Saved                       the tensors that are kept, ending in `saved`
//   enum Gradient                    the tensors that gradients flow to, ending in `gradients`
//   visit(call, action)              action(member) for each member
//   backward(tensors, dy, wanted)    the gradients
// The mutex of the base class stands between one thread's backward pass and another's release of what is saved.
template <class Call>
class CallNode final : public torch::autograd::Node {
 public:
  using Tensors = std::array<Tensor, Call::saved>;
  using Wanted = std::array<bool, Call::gradients>;

  CallNode(Call call, torch::autograd::edge_list&& next_edges) : Node(std::move(next_edges)), call(std::move(call)) {}

  Call call;

  void save(typename Call::Saved name, const Tensor& tensor, bool is_output = false) {
    if (tensor.defined()) saved_[name] = torch::autograd::SavedVariable(tensor, is_output);
  }

  std::string name() const override { return Call::name; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved_) variable.reset_data();
  }

  // A node that compiled autograd traces is a call of `replay` in its graph, with all it knows among the arguments.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(std::string(Call::name));
    Call::visit(call, [&](const auto& member) { args.collect(member); });
    for (const auto& variable : saved_) args.collect(variable, /*is_output=*/true);
  }

  variable_list apply_with_saved(const variable_list& inputs,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (auto& variable : saved_) swap.before(variable);
    torch::dynamo::autograd::PackedArgs packed;
    const Tensors tensors = unpack();
    packed.pack(variable_list(tensors.begin(), tensors.end()));
    const Wanted wanted = wanted_gradients();
    packed.pack(std::vector<bool>(wanted.begin(), wanted.end()));
    Call::visit(call, [&](const auto& member) { packed.pack(member); });

    const std::vector<c10::IValue> arguments = std::move(packed).vec();
    std::vector<at::TypePtr> types;
    for (const auto& argument : arguments) types.push_back(argument.type());
    const auto edges =
        torch::dynamo::autograd::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            torch::dynamo::autograd::get_input_metadata(next_edges()));
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const auto function = compiler->bind_function(swap.get_py_compiler(), typeid(Call).name(), replay, std::move(types),
                                                  /*is_custom_function=*/true, /*is_traceable=*/false);
    auto gradients =
        compiler->call_function(swap.get_py_compiler(), "apply_functional", function, inputs, arguments, edges);
    for (auto& variable : saved_) swap.after(variable);
    return gradients;
  }

 private:
  variable_list apply(variable_list&& grad_outputs) override {
    if (!grad_outputs[0].defined()) return variable_list(Call::gradients);
    return call.backward(unpack(), grad_outputs[0], wanted_gradients());
  }

  static variable_list replay(const variable_list& grad_outputs, const std::vector<c10::IValue>& arguments) {
    if (!grad_outputs[0].defined()) return variable_list(Call::gradients);
    torch::dynamo::autograd::PackedArgs packed(arguments);
    const auto list = packed.unpack<variable_list>();
    const auto flags = packed.unpack<std::vector<bool>>();
    Tensors tensors;
    Wanted wanted;
    std::copy(list.begin(), list.end(), tensors.begin());
    std::copy(flags.begin(), flags.end(), wanted.begin());
    Call call{};
    Call::visit(call, [&](auto& member) { member = packed.unpack<std::decay_t<decltype(member)>>(); });
    return call.backward(tensors, grad_outputs[0], wanted);
  }

  // An error where they were released, or rewritten since.
  Tensors unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    Tensors tensors;
    for (size_t i = 0; i < tensors.size(); ++i) tensors[i] = saved_[i].unpack(getptr());
    return tensors;
  }

  Wanted wanted_gradients() const {
    Wanted wanted;
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    return wanted;
  }

  std::array<torch::autograd::SavedVariable, Call::saved> saved_;
};

// Since 2.13 torch counts references to a node inside it.
template <class Call, class... Inputs>
auto make_node(Call call, const Inputs&... inputs) {
  using Node = CallNode<Call>;
  auto edges = torch::autograd::collect_next_edges(inputs...);
  if constexpr (std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Node>(new Node(std::move(call), std::move(edges)), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>(std::move(call), std::move(edges));
  }
}

}  // namespace batchnorm_ext::bindings
