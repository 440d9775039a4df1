// The operators of Weight Standardization for a GPU, as triton/weights.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "../../nodes/checks.h"
#include "cuts.h"
#include "memory.h"
#include "operators.h"
#include "register.h"

namespace wsbcn::gpu {
namespace {

using at::TensorList;

// By its place in triton/variants.py.
int64_t place_of(std::string_view formula) {
  if (formula == "paper") return 0;
  if (formula == "var_eps") return 1;
  TORCH_CHECK_VALUE(formula == "std_eps", "formula must be paper, var_eps or std_eps\n  got ",
                    formula);
  return 2;
}

struct Rows {
  int64_t number, length;
};

Rows rows_of(const Tensor& weight) {
  return {weight.size(0), weight.numel() / weight.size(0)};
}

void check_rows(int64_t rows, const Tensor& weight, const Tensor& mean, const Tensor& sigma) {
  check_statistic(mean, "mean", {rows}, weight);
  check_statistic(sigma, "sigma", {rows}, weight);
  TORCH_CHECK_VALUE(mean.is_contiguous() && sigma.is_contiguous(),
                    "mean and sigma must be contiguous");
}

// One tensor like every weight, in its memory format; all of one dtype.
void check_alike(const char* name, TensorList tensors, TensorList weights) {
  TORCH_CHECK_VALUE(!weights.empty() && tensors.size() == weights.size(), name,
                    " must have a tensor per weight\n  got ", tensors.size(), " for ",
                    weights.size());
  for (size_t k = 0; k < tensors.size(); ++k) {
    const Tensor &tensor = tensors[k], &weight = weights[k];
    check_weight(weight);
    TORCH_CHECK_VALUE(
        tensor.device() == weights[0].device() &&
            tensor.scalar_type() == tensors[0].scalar_type() && tensor.is_floating_point() &&
            tensor.sizes() == weight.sizes() && tensor.is_contiguous(layout_of(weight)),
        name, "[", k, "] must lie in memory as its weight, ", weight.sizes(), " with strides ",
        weight.strides(), ", all of one dtype and device\n  got ", tensor.scalar_type(),
        " of shape ", tensor.sizes(), " with strides ", tensor.strides(), " on ", tensor.device());
  }
}

// The rows of `tensor` that belong to a weight.
Pointer part_of(const Tensor& tensor, int64_t offset) {
  return {static_cast<char*>(tensor.mutable_data_ptr()) + offset * tensor.element_size(),
          tensor.scalar_type()};
}

// `tensors`: what the kernel goes through side by side; a program per row.
void start_one(const char* kernel, const Tensor& weight, std::initializer_list<Pointer> pointers,
               double eps, std::string_view formula) {
  const Rows rows = rows_of(weight);
  const int64_t block_size = block(rows.length, 2 * limits().tile);
  start(kernel, {rows.number}, weight.device(),
        {pointers,
         {rows.length, bits(eps)},
         {{"FORMULA", place_of(formula)},
          {"VECTOR", gcd(rows.length, 16 / weight.element_size())},
          {"BLOCK", block_size},
          {"num_warps", warps(block_size)}}});
}

// The tables that are kept: captured graphs read them, none is ever freed. Networks that use other
// layers in each step would fill the memory, and wait for the copy of each.
constexpr size_t kTables = 4096;

// See `row_of_program` in triton/jit/weights.py. Kept, and not made while a graph is captured,
// which a copy to the device would end: undefined then.
Tensor table_of(TensorList weights, at::IntArrayRef offsets, int64_t count) {
  static std::mutex mutex;
  static auto& tables = *new std::map<std::vector<int64_t>, Tensor>;
  std::vector<int64_t> first, lengths, places;
  int64_t rows = 0;
  for (size_t k = 0; k < static_cast<size_t>(count); ++k) {
    const bool there = k < weights.size();  // no program is as far as the others
    first.push_back(rows);
    lengths.push_back(there ? rows_of(weights[k]).length : 0);
    places.push_back(there ? offsets[k] : 0);
    if (there) rows += weights[k].size(0);
  }
  const c10::Device device = weights[0].device();
  std::vector<int64_t> key{static_cast<int64_t>(device.type()), device.index()};
  for (const auto& part : {first, lengths, places}) key.insert(key.end(), part.begin(), part.end());
  std::lock_guard<std::mutex> guard(mutex);
  const auto found = tables.find(key);
  if (found != tables.end()) return found->second;
  if (tables.size() == kTables || capture_on(device) != 0) return {};
  const at::ArrayRef<int64_t> values(key.data() + 2, key.size() - 2);
  return tables[key] = at::tensor(values, at::kLong).view({3, count}).to(device);
}

// False where that cannot be.
bool start_many(const char* kernel, TensorList weights, std::vector<Pointer> pointers,
                int64_t tuples, at::IntArrayRef offsets, const Tensor& mean, const Tensor& sigma,
                double eps, std::string_view formula) {
  const int64_t count = pointers.size() / tuples;
  int64_t rows = 0, longest = 0;
  for (const Tensor& weight : weights) {
    rows += weight.size(0);
    longest = std::max(longest, rows_of(weight).length);
  }
  // A view may start anywhere.
  const bool aligned = std::all_of(pointers.begin(), pointers.end(), [](const Pointer& p) {
    return reinterpret_cast<uintptr_t>(p.address) % 16 == 0;
  });
  const int64_t block_size = block(longest, limits().weights_tile);
  const Tensor table = table_of(weights, offsets, count);
  if (!table.defined()) return false;
  pointers.insert(pointers.end(), {read(table), written(mean), written(sigma)});
  start(kernel, {rows}, weights[0].device(),
        {pointers,
         {bits(eps)},
         {{"FORMULA", place_of(formula)},
          {"VECTOR", aligned ? 16 / weights[0].element_size() : 1},
          {"BLOCK", block_size},
          {"COUNT", count},
          {"num_warps", warps(2 * block_size, 4)}},
         tuples,
         count});
  return true;
}

// As many as a launch takes, filled up to a power of two: few numbers to compile for.
template <typename Address>
void append(std::vector<Pointer>& pointers, TensorList tensors, Address address) {
  const size_t count = next_power_of_2(tensors.size());
  for (size_t k = 0; k < count; ++k) {
    pointers.push_back(address(tensors[std::min(k, tensors.size() - 1)]));
  }
}

const auto reading = [](const Tensor& tensor) { return read(tensor); };
const auto writing = [](const Tensor& tensor) { return written(tensor); };

}  // namespace

void standardize_all(TensorList weights, double eps, std::string_view formula, TensorList out,
                     const Tensor& mean, const Tensor& sigma) {
  check_alike("weights", weights, weights);
  check_alike("out", out, weights);
  const c10::DeviceGuard guard(weights[0].device());
  std::vector<int64_t> offsets{0};
  for (const Tensor& weight : weights) offsets.push_back(offsets.back() + weight.size(0));
  check_rows(offsets.back(), weights[0], mean, sigma);
  const size_t most = limits().weights_at_once;
  for (size_t first = 0; first < weights.size(); first += most) {
    const size_t number = std::min(most, weights.size() - first);
    if (number > 1) {
      const TensorList part = weights.slice(first, number);
      std::vector<Pointer> pointers;
      append(pointers, part, reading);
      append(pointers, out.slice(first, number), writing);
      if (start_many("standardize_many", part, std::move(pointers), 2,
                     at::IntArrayRef(offsets).slice(first, number), mean, sigma, eps, formula)) {
        continue;
      }
    }
    for (size_t k = first; k < first + number; ++k) {
      start_one("standardize", weights[k],
                {read(weights[k]), written(out[k]), part_of(mean, offsets[k]),
                 part_of(sigma, offsets[k])},
                eps, formula);
    }
  }
}

void standardize_all_backward(TensorList grads, TensorList weights, at::IntArrayRef offsets,
                              const Tensor& mean, const Tensor& sigma, double eps,
                              std::string_view formula, TensorList out) {
  check_alike("weights", weights, weights);
  check_alike("out", out, weights);
  const c10::DeviceGuard guard(weights[0].device());
  check_rows(mean.numel(), weights[0], mean, sigma);
  TORCH_CHECK_VALUE(offsets.size() == weights.size() && grads.size() == weights.size(),
                    "offsets and grads must have a value per weight\n  got ", offsets.size(),
                    " and ", grads.size(), " for ", weights.size());
  std::vector<Tensor> dense_grads;
  for (size_t k = 0; k < weights.size(); ++k) {
    TORCH_CHECK_VALUE(offsets[k] >= 0 && offsets[k] + weights[k].size(0) <= mean.numel(),
                      "offsets[", k, "] must leave room for ", weights[k].size(0), " rows of ",
                      mean.numel(), "\n  got ", offsets[k]);
    dense_grads.push_back(grads[k].contiguous(layout_of(weights[k])));
  }
  check_alike("grads", dense_grads, weights);
  const TensorList all_grads = dense_grads;
  const size_t most = limits().weights_at_once;
  for (size_t first = 0; first < weights.size(); first += most) {
    const size_t number = std::min(most, weights.size() - first);
    if (number > 1) {
      const TensorList part = weights.slice(first, number);
      std::vector<Pointer> pointers;
      append(pointers, all_grads.slice(first, number), reading);
      append(pointers, part, reading);
      append(pointers, out.slice(first, number), writing);
      if (start_many("standardize_many_backward", part, std::move(pointers), 3,
                     offsets.slice(first, number), mean, sigma, eps, formula)) {
        continue;
      }
    }
    for (size_t k = first; k < first + number; ++k) {
      start_one("standardize_backward", weights[k],
                {read(all_grads[k]), read(weights[k]), written(out[k]), part_of(mean, offsets[k]),
                 part_of(sigma, offsets[k])},
                eps, formula);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> standardize(const Tensor& weight, double eps,
                                               std::string_view formula, at::ScalarType dtype) {
  check_weight(weight);
  const c10::DeviceGuard guard(weight.device());
  const Tensor w_hat = at::empty_like(weight, weight.options().dtype(dtype));
  const int64_t rows = weight.size(0);
  auto small = small_results(weight, {rows, rows});
  start_one("standardize", weight,
            {read(weight), written(w_hat), written(small[0]), written(small[1])}, eps, formula);
  return {w_hat, small[0], small[1]};
}

Tensor standardize_backward(const Tensor& grad, const Tensor& weight, const Tensor& mean,
                            const Tensor& sigma, double eps, std::string_view formula) {
  check_weight(weight);
  check_gradient(grad, weight);
  const c10::DeviceGuard guard(weight.device());
  const Tensor m = mean.contiguous(), s = sigma.contiguous();
  check_rows(weight.size(0), weight, m, s);
  const Tensor g = grad.contiguous(layout_of(weight));
  const Tensor dw = at::empty_like(weight);
  start_one("standardize_backward", weight, {read(g), read(weight), written(dw), read(m), read(s)},
            eps, formula);
  return dw;
}

}  // namespace wsbcn::gpu
