#include "launch.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "register.h"

namespace wsbcn::gpu {
namespace {

// cuLaunchKernel of the driver.
using LaunchKernel = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                             unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                             void* stream, void** parameters, void** extra);
// aoti_torch_get_current_cuda_stream of torch; 0: no error.
using CurrentStream = int32_t (*)(int32_t device, void** stream);
// cuStreamGetCaptureInfo of the driver; the last three may be null.
using CaptureInfo = int (*)(void* stream, int* status, uint64_t* id, void** graph,
                            const void** dependencies, size_t* number);

// What it returns in a thread that has not used the device yet.
constexpr int INVALID_CONTEXT = 201;

std::atomic<int64_t> launches_so_far{0};

// What Python knows, in the order in which `launcher` of triton/variants.py returns it.
struct Settings {
  LaunchKernel launch;   // none: nothing is launched, which measures all but the driver
  CurrentStream stream;  // none: everything on stream 0
  CaptureInfo capture;   // none: nothing is captured
  Limits limits;
};
static_assert(sizeof(Settings) == sizeof(int64_t) * 12);

struct Variant {
  void* function;
  unsigned threads, shared;
  int64_t scratch_pointers;  // null pointers behind the arguments
};

std::mutex mutex;
std::unordered_map<std::string, Variant> variants;
// Never freed: somebody may be reading them.
std::atomic<const Settings*> settings{nullptr};

c10::OperatorHandle python(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

// Asks Python, which also gives the calling thread the context of the current device.
const Settings& ask_launcher() {
  static const auto launcher = python("wsbcn_mm::launcher");
  torch::jit::Stack stack;
  launcher.callBoxed(stack);
  const std::vector<int64_t> values = stack.at(0).toIntVector();
  TORCH_CHECK(values.size() * sizeof(int64_t) == sizeof(Settings), "launcher must return ",
              sizeof(Settings) / sizeof(int64_t), " numbers");
  auto* const found = new Settings;
  std::memcpy(found, values.data(), sizeof(Settings));
  settings.store(found, std::memory_order_release);
  return *found;
}

// Python is asked at the first use: there may be no GPU, and then Triton is not imported.
const Settings& current() {
  const Settings* const known = settings.load(std::memory_order_acquire);
  return known != nullptr ? *known : ask_launcher();
}

bool is_wide(int64_t number) {
  return number != static_cast<int32_t>(number);
}

bool is_aligned(const Pointer& pointer) {
  return reinterpret_cast<uintptr_t>(pointer.address) % 16 == 0;
}

// Whatever Triton may compile a kernel for, in one string.
// Not inlined: the compiler would ask for the address of a thread's string at every write to it.
[[gnu::noinline]]
void write_key(std::string& key, const char* kernel, c10::Device device, const Arguments& a) {
  key.clear();
  key.append(reinterpret_cast<const char*>(&kernel), sizeof kernel);
  key.push_back(static_cast<char>(device.index()));
  key.push_back(static_cast<char>(a.tuple_size));
  for (const Pointer& p : a.pointers) {
    const int kind = p.address == nullptr ? -1 : 2 * static_cast<int>(p.dtype) + is_aligned(p);
    key.push_back(static_cast<char>(kind));
  }
  for (const int64_t number : a.numbers) key.push_back(static_cast<char>(is_wide(number)));
  for (const Constant& constant : a.constants) {
    const auto value = static_cast<int32_t>(constant.value);
    key.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
}

// A tensor at that address, of as many values as nobody reads.
OptionalTensor as_tensor(const Pointer& pointer, c10::Device device) {
  if (pointer.address == nullptr) return std::nullopt;
  const auto options = at::TensorOptions().dtype(pointer.dtype).device(device);
  return at::for_blob(pointer.address, {1}).options(options).target_device(device).make_tensor();
}

Variant compile(const char* kernel, c10::Device device, const Arguments& a) {
  static const auto op = python("wsbcn_mm::compile_kernel");
  c10::List<OptionalTensor> pointers;
  for (const Pointer& pointer : a.pointers) pointers.push_back(as_tensor(pointer, device));
  std::vector<std::string> names;
  std::vector<int64_t> values;
  for (const Constant& constant : a.constants) {
    names.emplace_back(constant.name);
    values.push_back(constant.value);
  }
  torch::jit::Stack stack;
  stack.emplace_back(std::string(kernel));
  stack.emplace_back(std::move(pointers));
  stack.emplace_back(std::vector<int64_t>{a.tuples, a.tuple_size});
  stack.emplace_back(a.numbers.vec());
  stack.emplace_back(std::move(names));
  stack.emplace_back(std::move(values));
  op.callBoxed(stack);
  const std::vector<int64_t> found = stack.at(0).toIntVector();
  TORCH_CHECK(found.size() == 4, "compile_kernel must return four numbers");
  return {reinterpret_cast<void*>(found[0]), static_cast<unsigned>(found[1]),
          static_cast<unsigned>(found[2]), found[3]};
}

[[gnu::noinline]]
std::string& key_of_thread() {
  thread_local std::string key;
  return key;
}

Variant variant_of(const char* kernel, c10::Device device, const Arguments& arguments) {
  std::string& key = key_of_thread();
  write_key(key, kernel, device, arguments);
  {
    std::lock_guard<std::mutex> guard(mutex);
    const auto found = variants.find(key);
    if (found != variants.end()) return found->second;
  }
  const std::string kept = key;  // compiling may come back here
  const Variant variant = compile(kernel, device, arguments);
  std::lock_guard<std::mutex> guard(mutex);
  return variants.emplace(kept, variant).first->second;
}

// Asks Python anew: for tests, which cut in other ways.
void reset_launcher() {
  std::lock_guard<std::mutex> guard(mutex);
  settings = nullptr;
  variants.clear();
}

int64_t launches() {
  return launches_so_far;
}

TORCH_LIBRARY_IMPL(wsbcn_mm, CompositeExplicitAutograd, library) {
  library.impl("reset_launcher", reset_launcher);
  library.impl("launches", launches);
}

}  // namespace

const Limits& limits() {
  return current().limits;
}

std::optional<int64_t> capture_on(c10::Device device) {
  const Settings& s = current();
  void* stream = nullptr;
  int status = 0;
  uint64_t id = 0;
  if (s.capture == nullptr || s.stream == nullptr) return 0;
  if (s.stream(device.index(), &stream) != 0) return std::nullopt;
  if (s.capture(stream, &status, &id, nullptr, nullptr, nullptr) != 0) return std::nullopt;
  return status == 0 ? 0 : static_cast<int64_t>(id);
}

Pointer read(const Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return {};
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.scalar_type()};
}

Pointer read(const OptionalTensor& tensor) {
  return tensor.has_value() ? read(*tensor) : Pointer();
}

Pointer written(const Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return {};
  return {tensor.mutable_data_ptr(), tensor.scalar_type()};
}

void start(const char* kernel, Grid grid, c10::Device device, const Arguments& arguments) {
  if (grid.x * grid.y == 0) return;
  const Variant variant = variant_of(kernel, device, arguments);
  c10::SmallVector<void*, 64> parameters;
  // A parameter of 32 bits is the first half of a number.
  for (const Pointer& p : arguments.pointers) {
    if (p.address != nullptr) parameters.push_back(const_cast<void**>(&p.address));
  }
  for (const int64_t& number : arguments.numbers) {
    parameters.push_back(const_cast<int64_t*>(&number));
  }
  void* nothing = nullptr;
  for (int64_t i = 0; i < variant.scratch_pointers; ++i) parameters.push_back(&nothing);
  const Settings& s = current();
  void* stream = nullptr;
  if (s.stream != nullptr) {
    TORCH_CHECK(s.stream(device.index(), &stream) == 0, "torch has no stream on ", device);
  }
  ++launches_so_far;
  if (s.launch == nullptr) return;
  const auto launch = [&] {
    return s.launch(variant.function, grid.x, grid.y, 1, variant.threads, 1, 1, variant.shared,
                    stream, parameters.data(), nullptr);
  };
  int error = launch();
  if (error != 0) {
    ask_launcher();  // where a kernel before this one has failed, torch says so here
    if (error == INVALID_CONTEXT) error = launch();
  }
  TORCH_CHECK(error == 0, "the driver could not launch the kernel ", kernel, " on ", device,
              ": CUDA error ", error);
}

int64_t bits(double value) {
  int64_t result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

}  // namespace wsbcn::gpu
