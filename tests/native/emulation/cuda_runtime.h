// Stands in for CUDA's header of this name where kernels are compiled for the CPU emulation.
#pragma once

#include "cuda_emulation.h"
