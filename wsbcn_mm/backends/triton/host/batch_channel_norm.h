// What the operators of Batch-Channel Normalization hand to the launches: see triton/work.py.
#pragma once

#include "cuts.h"
#include "memory.h"

namespace wsbcn::gpu {

// Where the statistics of stage 1 come from; triton/variants.py has the names in this order.
enum class Source : int64_t { running, estimate, batch, given };

struct Stage1 {
  Source source;
  const Running* running = nullptr;
  double rate = 0;
  OptionalTensor rate_tensor;  // in place of rate

  bool needs_all_samples() const { return source == Source::estimate || source == Source::batch; }
};

// y and the statistics; evaluation asks for few of them.
struct Results {
  Tensor y;
  Pointer m, q, mean, var, group_mean, inv_group_std;
};

struct Gradients {
  Tensor dx, batch_weight, batch_bias, weight, bias;
};

struct BackwardCall {
  const Tensor &grad, &x;
  int64_t num_groups;
  const Statistics& statistics;
  const Affine& affine;
  double eps;
  bool through_statistics;
};

// In passes over all of x: moments, the algebra of the small tensors, the result.
namespace passes {

// What they hand to each other.
Sizes forward_scratch(const Tensor& x);
Sizes backward_scratch(const Tensor& x, int64_t num_groups);

// Chunks that are left to be merged, in scratch; none: m and q are written.
struct Chunks {
  Pointer first, second;
};

Chunks moments(const Tensor& x, Pointer m, Pointer q, const Scratch& scratch);
// Where there are some.
void merge(const Tensor& x, const Chunks& chunks, Pointer m, Pointer q);
void normalize(const Tensor& x, int64_t num_groups, const Results& results, const Stage1& stage_1,
               const Affine& affine, double eps, const Scratch& scratch, const Chunks& chunks);
void gradients_of(const BackwardCall& call, const Gradients& gradients, const Scratch& scratch);

}  // namespace passes

// Where a program holds a group of a sample: one launch.
namespace at_once {

void normalize(const Tensor& x, const Results& results, const Stage1& stage_1, const Held& cut,
               const Affine& affine, double eps);
void gradients_of(const BackwardCall& call, const Held& cut, const Gradients& gradients);

}  // namespace at_once

// What several of them need.
Affine dense(const Affine& affine);
int64_t stride_of(const Running* running, Tensor Running::* buffer);
int64_t repeat(const OptionalTensor& affine, int64_t channels);
// The buffers, written where they are updated.
Pointer buffer(const Stage1& stage_1, Tensor Running::* buffer);
Pointer counter(const Stage1& stage_1, OptionalTensor Running::* counter);

}  // namespace wsbcn::gpu
