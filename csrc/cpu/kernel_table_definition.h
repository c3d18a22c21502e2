// Defines one instruction set's kernel table. The last include of its translation unit.
#pragma once

#include "cpu/batch_norm_steps.h"
#include "cpu/kernel_table.h"

namespace batchnorm_ext::cpu::BN_CPU_ISA {

const KernelTable kernels = {
    dispatch<ForwardParams, forward<double>, forward<float>, forward<float16>, forward<bfloat16>>,
    dispatch<BackwardParams, backward<double>, backward<float>, backward<float16>, backward<bfloat16>>,
};

}  // namespace batchnorm_ext::cpu::BN_CPU_ISA
