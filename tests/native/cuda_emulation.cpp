// The engine of the CUDA emulation: fibers, the order in which they run, and what they wait for.
#include "cuda_emulation.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr int kIdleRounds = 1000;          // in which threads only spin, before they are taken to wait for ever
constexpr size_t kStackBytes = 256 << 10;  // touched only as far as it is used

#if defined(__x86_64__)
// Saves the callee's registers and the stack pointer, and takes up another stack where it was left. The C library's
// swapcontext would make two system calls each time.
using Context = void*;
__attribute__((naked, noinline)) void swap(Context*, Context) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}
void switch_stacks(Context& from, Context& to) {
  swap(&from, to);
}
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // entry never returns; this keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  context = top - 6;
}
#else
using Context = ucontext_t;
void switch_stacks(Context& from, Context& to) {
  swapcontext(&from, &to);
}
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, entry, 0);
}
#endif

// A meeting of several threads: the generation counts how often all of them have come.
struct Meeting {
  unsigned arrived = 0;
  int site = 0;
  uint64_t generation = 0;
};

struct Warp {
  unsigned mask = 0, arrived = 0;  // lanes that are to come, and those that have
  unsigned live = 0;
  int site = 0;
  uint64_t generation = 0;
  alignas(16) unsigned char slots[2][32][16] = {};
};

// Blocks that start together.
struct Company {
  unsigned live = 0, arrived = 0;  // threads
  uint64_t generation = 0;
};

struct Block {
  unsigned live = 0;
  Meeting barrier;
  Company* cluster = nullptr;
  Block* cluster_blocks = nullptr;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  uint64_t group;
};

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;
  unsigned thread = 0;
  uint3 block_index{};
  Block* block = nullptr;
  const uint64_t* awaited = nullptr;  // runnable when this no longer has the value
  uint64_t value = 0;
  bool busy = false;
  bool spinning = false;
  bool arrived_at_cluster = false;
  uint64_t cluster_generation = 0;
  std::vector<Copy> copies;  // under way, in their order
  uint64_t copy_groups = 0;  // committed
};

struct Engine {
  std::vector<std::unique_ptr<Fiber>> fibers, abandoned;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  Fiber* current = nullptr;
  const std::function<void()>* thread = nullptr;
  Company grid;  // of a cooperative launch
  Together together;
  std::string error;
};
Engine engine;

void before_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, bytes);
#endif
}
void after_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** old, [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, old, bytes);
#endif
}

void resume(Fiber& fiber) {
  engine.current = &fiber;
  threadIdx = {fiber.thread, 0, 0};
  blockIdx = fiber.block_index;
  lane = fiber.thread % 32;
  block_shared_memory = fiber.block->shared.get();
  before_switch(&engine.scheduler_fake_stack, fiber.stack, kStackBytes);
  switch_stacks(engine.scheduler, fiber.context);
  after_switch(engine.scheduler_fake_stack, nullptr, nullptr);
}

void suspend() {
  Fiber& fiber = *engine.current;
  before_switch(&fiber.fake_stack, engine.scheduler_stack, engine.scheduler_stack_bytes);
  switch_stacks(fiber.context, engine.scheduler);
  after_switch(fiber.fake_stack, &engine.scheduler_stack, &engine.scheduler_stack_bytes);
}

// The thread stays where it is, with whatever it holds: nothing here may be left to a destructor.
[[noreturn]] void fail(const char* what) {
  engine.error = what;
  engine.error += " (thread " + std::to_string(threadIdx.x) + " of block " + std::to_string(blockIdx.x) + ", " +
                  std::to_string(blockIdx.y) + ")";
  for (;;) suspend();
}

void wait_for(const uint64_t& generation) {
  engine.current->value = generation;
  engine.current->awaited = &generation;
  suspend();
}

// The last of the living to arrive lets all go.
void arrive(Company& company) {
  if (++company.arrived == company.live) {
    company.arrived = 0;
    ++company.generation;
  }
}

void leave(Company& company) {
  --company.live;
  if (company.live > 0 && company.arrived == company.live) {
    company.arrived = 0;
    ++company.generation;
  }
}

void leave(Block& block, unsigned warp_index, unsigned own_lane) {
  Warp& warp = block.warps[warp_index];
  warp.live &= ~(1u << own_lane);
  if (warp.arrived != 0 && (warp.mask >> own_lane & 1u) != 0) fail("ended while its warp waits for it");
  --block.live;
  if (block.live > 0 && block.barrier.arrived == block.live) {
    block.barrier.arrived = 0;
    ++block.barrier.generation;
  }
  leave(*block.cluster);
  leave(engine.grid);
  if (block.live == 0) block.shared.reset();
}

// A fiber outlives the thread it runs: the next block's thread starts on the same stack.
void fiber_main() {
  after_switch(nullptr, &engine.scheduler_stack, &engine.scheduler_stack_bytes);
  for (;;) {
    (*engine.thread)();
    Fiber& fiber = *engine.current;
    if (fiber.arrived_at_cluster) fail("ended between arriving at its cluster's barrier and waiting there");
    if (!fiber.copies.empty()) fail("ended with copies under way");
    leave(*fiber.block, fiber.thread / 32, fiber.thread % 32);
    fiber.busy = false;
    suspend();
  }
}

Fiber& new_fiber() {
  engine.fibers.push_back(std::make_unique<Fiber>());
  Fiber& fiber = *engine.fibers.back();
  void* const stack =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw EmulationError("no memory for the stack of a thread");
  fiber.stack = static_cast<unsigned char*>(stack);
  prepare(fiber.context, fiber.stack, fiber_main);
  return fiber;
}

// After an error the fibers hang in the middle of a thread: new ones replace them, and their stacks stay.
[[noreturn]] void give_up(const std::string& what) {
  for (auto& fiber : engine.fibers) engine.abandoned.push_back(std::move(fiber));
  engine.fibers.clear();
  throw EmulationError(what);
}

class Grid {
 public:
  Grid(dim3 grid, dim3 block, size_t shared_bytes, Together together)
      : cluster_(together.cluster), grid_(grid), block_(block), shared_bytes_(shared_bytes), random_(settings.seed) {
    blockDim = block;
    gridDim = grid;
    if (block.y != 1 || block.z != 1) throw EmulationError("blocks of one dimension only");
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    const uint64_t clusters = std::max(settings.live_blocks / cluster_, 1u);
    blocks_.resize(together.cooperative ? blocks : std::min<uint64_t>(clusters * cluster_, blocks));
    companies_.resize(blocks_.size() / cluster_);
    engine.grid = Company{};
    engine.grid.live = static_cast<unsigned>(blocks * block.x);
    while (engine.fibers.size() < blocks_.size() * block.x) new_fiber();
    numbers_.resize(blocks / cluster_);
    arrange(numbers_);
    turns_.resize(blocks_.size() * block.x);
    arrange(turns_);
  }

  void run() {
    size_t started = 0;
    int idle_rounds = 0;
    for (size_t c = 0; c < companies_.size(); ++c) start(c, numbers_[started++]);
    for (;;) {
      if (settings.order == Order::shuffled) std::shuffle(turns_.begin(), turns_.end(), random_);
      bool moved = false, busy = false;
      for (const uint64_t turn : turns_) {
        Fiber& fiber = *engine.fibers[turn];
        if (!fiber.busy) continue;
        busy = true;
        if (fiber.awaited != nullptr && *fiber.awaited == fiber.value) continue;
        fiber.awaited = nullptr;
        fiber.spinning = false;
        resume(fiber);
        moved = moved || !fiber.spinning;
        if (!engine.error.empty()) give_up(std::exchange(engine.error, std::string()));
      }
      for (size_t c = 0; c < companies_.size(); ++c) {
        if (companies_[c].live == 0 && started < numbers_.size()) {
          start(c, numbers_[started++]);
          busy = moved = true;
        }
      }
      if (!busy) return;
      idle_rounds = moved ? 0 : idle_rounds + 1;
      if (idle_rounds > kIdleRounds) give_up("all threads wait for ever");
    }
  }

 private:
  void arrange(std::vector<uint64_t>& indices) {
    std::iota(indices.begin(), indices.end(), uint64_t(0));
    if (settings.order == Order::descending) std::reverse(indices.begin(), indices.end());
    if (settings.order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), random_);
  }

  void start(size_t company, uint64_t number) {
    companies_[company] = Company{};
    companies_[company].live = cluster_ * block_.x;
    Block* const blocks = blocks_.data() + company * cluster_;
    for (unsigned rank = 0; rank < cluster_; ++rank) {
      blocks[rank].cluster = &companies_[company];
      blocks[rank].cluster_blocks = blocks;
      start(blocks[rank], number * cluster_ + rank);
    }
  }

  void start(Block& block, uint64_t number) {
    block.live = block_.x;
    block.barrier = Meeting{};
    block.warps.assign((block_.x + 31) / 32, Warp{});
    block.shared.reset(new unsigned char[shared_bytes_]);
    memset(block.shared.get(), 0xa5 ^ static_cast<int>(number & 0xff), shared_bytes_);
    const size_t first_fiber = static_cast<size_t>(&block - blocks_.data()) * block_.x;
    for (unsigned t = 0; t < block_.x; ++t) {
      Fiber& fiber = *engine.fibers[first_fiber + t];
      fiber.thread = t;
      fiber.block_index = {static_cast<unsigned>(number % grid_.x), static_cast<unsigned>(number / grid_.x % grid_.y),
                           static_cast<unsigned>(number / grid_.x / grid_.y)};
      fiber.block = &block;
      fiber.awaited = nullptr;
      fiber.arrived_at_cluster = false;
      fiber.copies.clear();
      fiber.copy_groups = 0;
      fiber.busy = true;
      block.warps[t / 32].live |= 1u << t % 32;
    }
  }

  unsigned cluster_;
  dim3 grid_, block_;
  size_t shared_bytes_;
  std::mt19937_64 random_;
  std::vector<Block> blocks_;
  std::vector<Company> companies_;  // the clusters of these blocks
  std::vector<uint64_t> numbers_;   // of the clusters, in the order they start
  std::vector<uint64_t> turns_;     // of the fibers
};

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Together together, const std::function<void()>& thread) {
  engine.thread = &thread;
  engine.together = together;
  Grid(grid, block, shared_bytes, together).run();
}

void sync_block(int site) {
  Block& block = *engine.current->block;
  Meeting& barrier = block.barrier;
  if (barrier.arrived > 0 && barrier.site != site) fail("threads of a block wait at different barriers");
  barrier.site = site;
  if (++barrier.arrived == block.live) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    wait_for(barrier.generation);
  }
}

void sync_warp(unsigned mask, int site) {
  Warp& warp = engine.current->block->warps[threadIdx.x / 32];
  const unsigned bit = 1u << lane;
  if ((mask & bit) == 0) fail("waits for a warp's meeting that it is not part of");
  if ((mask & ~warp.live) != 0) fail("waits for lanes of its warp that have ended");
  if (warp.arrived != 0 && (warp.mask != mask || warp.site != site))
    fail("lanes of a warp wait for different meetings");
  warp.mask = mask;
  warp.site = site;
  warp.arrived |= bit;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_for(warp.generation);
  }
}

void copy_async(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) {
    fail("copies what is off a boundary of the copy's size");
  }
  memset(to, 0x5a, bytes);
  Fiber& fiber = *engine.current;
  ++counters.copies;
  fiber.copies.push_back({to, from, bytes, fiber.copy_groups});
}

void commit_copies() {
  ++engine.current->copy_groups;
}

void wait_for_copies(unsigned pending) {
  Fiber& fiber = *engine.current;
  const auto is_awaited = [&](const Copy& copy) { return copy.group + pending < fiber.copy_groups; };
  const auto first_left = std::find_if_not(fiber.copies.begin(), fiber.copies.end(), is_awaited);
  for (auto copy = fiber.copies.begin(); copy != first_left; ++copy) memcpy(copy->to, copy->from, copy->bytes);
  fiber.copies.erase(fiber.copies.begin(), first_left);
}

void sync_grid() {
  if (!engine.together.cooperative) fail("waits for a grid that was not launched to be alive at once");
  const uint64_t generation = engine.grid.generation;
  arrive(engine.grid);
  if (engine.grid.generation == generation) wait_for(engine.grid.generation);
}

void arrive_at_cluster() {
  Fiber& fiber = *engine.current;
  if (fiber.arrived_at_cluster) fail("arrives twice at its cluster's barrier");
  fiber.arrived_at_cluster = true;
  fiber.cluster_generation = fiber.block->cluster->generation;
  arrive(*fiber.block->cluster);
}

void wait_for_cluster() {
  Fiber& fiber = *engine.current;
  if (!fiber.arrived_at_cluster) fail("waits at its cluster's barrier without having arrived");
  fiber.arrived_at_cluster = false;
  if (fiber.block->cluster->generation == fiber.cluster_generation) wait_for(fiber.block->cluster->generation);
}

unsigned char* shared_memory_of(unsigned rank) {
  if (rank >= engine.together.cluster) fail("asks for the shared memory of a block beyond its cluster");
  const Block& block = engine.current->block->cluster_blocks[rank];
  if (block.live == 0) fail("asks for the shared memory of a block that has ended");
  return block.shared.get();
}

void yield() {
  engine.current->spinning = true;
  suspend();
}

ExchangeSlots exchange_slots() {
  Warp& warp = engine.current->block->warps[threadIdx.x / 32];
  return warp.slots[warp.generation & 1];
}

}  // namespace emulation
