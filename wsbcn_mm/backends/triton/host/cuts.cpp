#include "cuts.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace wsbcn::gpu {
namespace {

struct Shape {
  int64_t samples, channels, length, itemsize;
  bool channels_last;

  explicit Shape(const Tensor& x)
      : samples(x.size(0)),
        channels(x.size(1)),
        length(x.numel() / (samples * channels)),
        itemsize(x.element_size()),
        channels_last(!x.is_contiguous() || length == 1) {}

  // Values of this size that 128 bits hold and that divide the contiguous axis.
  int64_t vector(int64_t contiguous) const { return gcd(contiguous, 16 / itemsize); }
};

}  // namespace

int64_t next_power_of_2(int64_t value) {
  int64_t result = 1;
  while (result < value) result *= 2;
  return result;
}

int64_t divided_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

int64_t block(int64_t size, int64_t limit) {
  return std::max<int64_t>(1, std::min(next_power_of_2(size), limit));
}

int64_t warps(int64_t values, int64_t most) {
  return std::max<int64_t>(1, std::min(values / 512, most));
}

int64_t gcd(int64_t a, int64_t b) {
  return std::gcd(a, b);
}

namespace {

// So that there are at least so many programs, where x is large enough.
Cut cut(const Tensor& x, int64_t programs, int64_t tile) {
  const Shape s(x);
  int64_t block_c, block_l;
  if (s.channels_last) {
    // At least 128 channels wide, if there are as many: segments that memory delivers whole.
    const int64_t narrow = std::min<int64_t>(128, tile);
    block_c = block(s.channels, std::max(narrow, tile / next_power_of_2(s.length)));
    block_l = block(s.length, tile / block_c);
  } else {
    block_l = block(s.length, tile);
    // See triton/cuts.py.
    const int64_t values = s.length % 2 == 1 ? tile / 4 : tile;
    block_c = block(s.channels, std::max<int64_t>(1, values / block_l));
  }
  const int64_t blocks_of_channels = s.samples * divided_up(s.channels, block_c);
  const int64_t tiles_of_row = divided_up(s.length, block_l);
  const int64_t tiles = divided_up(tiles_of_row, divided_up(programs, blocks_of_channels));
  const int64_t splits = divided_up(tiles_of_row, tiles);
  return {{blocks_of_channels, splits},
          s.length,
          tiles,
          splits,
          {s.channels_last ? 0 : 1, s.vector(s.channels_last ? s.channels : s.length), block_c,
           block_l, warps(block_c * block_l)}};
}

}  // namespace

std::array<Constant, 6> Cut::constants() const {
  return {{{"WHOLE", length <= layout.block_l},
           {"AXIS", layout.axis},
           {"VECTOR", layout.vector},
           {"BLOCK_C", layout.block_c},
           {"BLOCK_L", layout.block_l},
           {"num_warps", layout.num_warps}}};
}

Cut reducing(const Tensor& x) {
  const Limits l = limits();
  const int64_t programs = std::min(l.reducing, std::max(l.reducing / 4, x.numel() / (8 * l.tile)));
  return cut(x, programs, x.is_contiguous() ? l.tile : l.tile / 2);
}

Cut applying(const Tensor& x) {
  const Limits l = limits();
  return cut(x, l.applying, l.tile);
}

std::optional<Held> held(const Tensor& x, int64_t num_groups, int64_t most) {
  const Shape s(x);
  const int64_t width = s.channels / num_groups;
  const int64_t block_c = next_power_of_2(width), block_l = next_power_of_2(s.length);
  const int64_t values = block_c * block_l * std::max<int64_t>(1, s.itemsize / 4);
  const Limits most_of_all = limits();
  if (values > most || s.samples * values > most_of_all.held_at_once ||
      s.samples > most_of_all.held_samples) {
    return std::nullopt;
  }
  // Places in a sample are of 32 bits.
  if (s.channels * s.length > std::numeric_limits<int32_t>::max()) return std::nullopt;
  return Held{num_groups,
              s.length,
              // 8 values per thread
              {s.channels_last ? 0 : 1, s.vector(s.channels_last ? width : s.length), block_c,
               block_l, warps(2 * values, 16)}};
}

MergeBlocks merge_blocks(int64_t rows, int64_t splits) {
  const int64_t block_k = next_power_of_2(splits);
  return {block(rows, limits().tile / block_k), block_k};
}

AlgebraBlocks algebra_blocks(int64_t samples, int64_t width, int64_t splits) {
  const int64_t tile = limits().tile;
  const int64_t block_c = block(width, tile / block(samples, 32));
  const int64_t block_n = block(samples, tile / block_c);
  const MergeBlocks merge = merge_blocks(samples * width, splits);
  // Few values per thread: this kernel waits, for one result after the other.
  const int64_t values = std::max(block_n * block_c, merge.block_r * merge.block_k);
  return {block_n, block_c, merge.block_r, merge.block_k, warps(2 * values)};
}

}  // namespace wsbcn::gpu
