// How work is cut into programs, as triton/cuts.py does it: by the shape of a tensor alone.
#pragma once

#include <array>
#include <optional>

#include "launch.h"

namespace wsbcn::gpu {

int64_t next_power_of_2(int64_t value);
int64_t divided_up(int64_t value, int64_t by);
// The power of two that covers `size`, up to `limit`.
int64_t block(int64_t size, int64_t limit);
// 16 values per thread.
int64_t warps(int64_t values, int64_t most = 8);
int64_t gcd(int64_t a, int64_t b);

// A tile, and how the layout of x lets it be read.
struct Layout {
  int64_t axis, vector, block_c, block_l, num_warps;
};

// `tiles` tiles make a chunk, `splits` chunks a row.
struct Cut {
  Grid grid;
  int64_t length, tiles, splits;
  Layout layout;

  std::array<Constant, 6> constants() const;
};

// For a pass that reduces, and one that writes.
Cut reducing(const Tensor& x);
Cut applying(const Tensor& x);

// Where a program holds a group of a sample.
struct Held {
  int64_t num_groups, length;
  Layout layout;
};

// None: a group of a sample has more than `most` values, or that of all too many.
std::optional<Held> held(const Tensor& x, int64_t num_groups, int64_t most);

// Of the kernels that compute with the rows of a group: its channels, its samples, its chunks.
struct AlgebraBlocks {
  int64_t block_n, block_c, block_r, block_k, num_warps;
};

AlgebraBlocks algebra_blocks(int64_t samples, int64_t width, int64_t splits);

struct MergeBlocks {
  int64_t block_r, block_k;
};

MergeBlocks merge_blocks(int64_t rows, int64_t splits);

}  // namespace wsbcn::gpu
