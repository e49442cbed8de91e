// A device of which the memory is the host's, behind torch's PrivateUse1 key: it runs no faster, it is strict.
//
//  - Every operation runs on the CPU, after a check that its tensors lie on one device, of which there are two.
//  - Whatever would make the host wait for a stream says so, if asked to, in a warning.
//  - A copy to pinned memory that need not be waited for arrives when an event recorded after it has passed, not before.
//  - Backward runs in a thread of the device's own, as on every accelerator.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <set>
#include <string>
#include <unordered_set>
#include <utility>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr auto kKeys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
// An event has passed at the second question whether it has.
constexpr int kQuestions = 2;
constexpr c10::DeviceIndex kCount = 2;

thread_local c10::DeviceIndex current = 0;

std::recursive_mutex guard;
std::unordered_set<const void*> pinned;
std::atomic<bool> float64 = true, says = false, capturing = false;

// True inside an operation, whose detour over the host is this file's affair and counts for nothing.
thread_local bool inside = false;

void wait(const std::string& why) {
  TORCH_CHECK(!capturing, why, " is not permitted while a graph is made");
  if (says) {
    TORCH_WARN("the host waits for the device: ", why);
  }
}

// Copies under way, in the order of the stream. All of them arrive when the host waits for the device.
struct Copy {
  int64_t number;
  at::Tensor into;
  at::Tensor from;
};
std::deque<Copy> under_way;
int64_t submitted = 0;

void arrive(int64_t upto) {
  std::lock_guard<std::recursive_mutex> hold(guard);
  while (!under_way.empty() && under_way.front().number <= upto) {
    under_way.front().into.copy_(under_way.front().from);
    under_way.pop_front();
  }
}

template <class Kind>
struct HostAllocator : c10::Allocator {
  c10::DeleterFnPtr raw_deleter() const override {
    return &Kind::free;
  }
  void copy_data(void* to, const void* from, std::size_t n) const override {
    std::memcpy(to, from, n);
  }
};

struct DeviceAllocator final : HostAllocator<DeviceAllocator> {
  c10::DataPtr allocate(size_t n) override {
    void* data = n == 0 ? nullptr : c10::GetCPUAllocator()->raw_allocate(n);
    if (data != nullptr) {
      std::memset(data, 0x7f, n);  // what was never written is no zero
    }
    return {data, data, &free, c10::Device(kDevice, current)};
  }
  static void free(void* data) {
    if (data != nullptr) {
      c10::GetCPUAllocator()->raw_deallocate(data);
    }
  }
} allocator;

struct PinnedAllocator final : HostAllocator<PinnedAllocator> {
  c10::DataPtr allocate(size_t n) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(n == 0 ? 1 : n);
    std::lock_guard<std::recursive_mutex> hold(guard);
    pinned.insert(data);
    return {data, data, &free, c10::Device(c10::DeviceType::CPU)};
  }
  static void free(void* data) {
    std::lock_guard<std::recursive_mutex> hold(guard);
    pinned.erase(data);
    c10::GetCPUAllocator()->raw_deallocate(data);
  }
} pinned_allocator;

struct Event {
  int64_t after = 0;
  int questions = 0;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kDevice;
  }
  c10::Device exchangeDevice(c10::Device d) const override {
    return {kDevice, std::exchange(current, d.index())};
  }
  c10::Device getDevice() const override {
    return {kDevice, current};
  }
  void setDevice(c10::Device d) const override {
    current = d.index();
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    current = d.index();
  }
  c10::Stream getStream(c10::Device d) const override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream getNewStream(c10::Device d, int) const override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream exchangeStream(c10::Stream s) const override {
    return s;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return kCount;
  }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    std::lock_guard<std::recursive_mutex> hold(guard);
    if (*event == nullptr) {
      *event = new Event;
    }
    *static_cast<Event*>(*event) = {submitted, 0};
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void* event) const override {
    auto* e = static_cast<Event*>(event);
    if (e == nullptr || ++e->questions >= kQuestions) {
      arrive(e == nullptr ? submitted : e->after);
      return true;
    }
    return false;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {
    wait("synchronize stream");
    arrive(submitted);
  }
  void synchronizeEvent(void* event) const override {
    wait("synchronize event");
    arrive(event == nullptr ? submitted : static_cast<Event*>(event)->after);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    wait("synchronize device");
    arrive(submitted);
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return kCount;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current;
  }
  void setCurrentDevice(c10::DeviceIndex d) const override {
    current = d;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    return std::exchange(current, d);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override {
    return std::exchange(current, d);
  }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::recursive_mutex> hold(guard);
    return pinned.count(data) > 0;
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_allocator;
  }
  at::Device getDeviceFromPtr(void*) const override {
    return {kDevice, current};
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    c10::DeviceGuard on(storage.device());
    auto fresh = allocator.allocate(n);
    std::memcpy(fresh.get(), storage.data(), std::min(n, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(n);
  }
};

bool on_device(const at::Tensor& t) {
  return t.defined() && t.device().type() == kDevice;
}

// The same memory as a tensor of the host.
at::Tensor as_host(const at::Tensor& t) {
  if (!on_device(t)) {
    return t;
  }
  auto flat = at::from_blob(t.storage().mutable_data(), {int64_t(t.storage().nbytes())}, at::kByte);
  auto out = at::empty({0}, t.options().device(c10::DeviceType::CPU));
  out.set_(flat.storage(), t.storage_offset(), t.sizes(), t.strides());
  out._set_conj(t.is_conj());
  out._set_neg(t.is_neg());
  return out;
}

at::Tensor to_device(const at::Tensor& t, c10::Device device) {
  if (!t.defined()) {
    return t;
  }
  auto out = at::empty_strided(t.sizes(), t.strides(), t.options().device(device));
  as_host(out).copy_(t);
  return out;
}

void allow(at::ScalarType t) {
  TORCH_CHECK_TYPE(float64 || t != at::kDouble, "this device has no float64");
}

at::Tensor empty(
    c10::SymIntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  allow(c10::dtype_or_default(dtype));
  c10::OptionalDeviceGuard on(device);
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>) {
  allow(c10::dtype_or_default(dtype));
  c10::OptionalDeviceGuard on(device);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator, kKeys, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(
    const at::Tensor& self,
    c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride,
    std::optional<c10::SymInt> offset) {
  auto at = offset.has_value() ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard on(self.device());  // what grows stays where it is
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_storage_(
    at::Tensor& self,
    at::Storage source,
    c10::SymInt offset,
    c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(
      self, std::move(source), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_tensor_(at::Tensor& self, const at::Tensor& source) {
  return at::native::set_tensor_(self, source);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  const bool up = on_device(dst) && !on_device(self), down = on_device(self) && !on_device(dst);
  if (inside) {
    as_host(dst).copy_(as_host(self));
    return dst;
  }
  std::lock_guard<std::recursive_mutex> hold(guard);
  TORCH_CHECK(!capturing || (!up && !down), "copies of the host's memory are not permitted while a graph is made");
  if (down && non_blocking && dst.is_pinned()) {
    under_way.push_back({++submitted, dst, as_host(self).clone()});
    return dst;
  }
  if (down || (up && !non_blocking)) {
    wait(down ? "copy to the host" : "copy to the device");
    arrive(submitted);
  }
  as_host(dst).copy_(as_host(self));
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  wait("item");
  arrive(submitted);
  return as_host(self).item();
}

at::Tensor convolution(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool transposed,
    at::IntArrayRef output_padding,
    int64_t groups) {
  auto b = bias.has_value() ? std::optional<at::Tensor>(as_host(*bias)) : bias;
  auto out = at::convolution(
      as_host(input), as_host(weight), b, stride, padding, dilation, transposed, output_padding, groups);
  return to_device(out, input.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad,
    const at::Tensor& input,
    const at::Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool transposed,
    at::IntArrayRef output_padding,
    int64_t groups,
    std::array<bool, 3> mask) {
  auto [a, b, c] = at::convolution_backward(
      as_host(grad), as_host(input), as_host(weight), weight.size(transposed ? 1 : 0), stride, padding, dilation,
      transposed, output_padding, groups, mask);
  return {to_device(a, input.device()), to_device(b, input.device()), to_device(c, input.device())};
}

// The CPU has it for no integers, other devices do.
at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& min, const at::Scalar& max) {
  return to_device(at::histc(as_host(self).to(at::kFloat), bins, min, max).to(self.scalar_type()), self.device());
}

// Operations whose result has a size, or is a decision, that only the device knows.
const std::set<std::string> kWaiting = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero", "aten::_unique2", "aten::bincount",
    "aten::unique_consecutive", "aten::unique_dim", "aten::allclose", "aten::argwhere"};

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto count = op.schema().arguments().size();
  const bool indexes = name.rfind("aten::index", 0) == 0 || name == "aten::_index_put_impl_";
  bool waits_ = kWaiting.count(name) > 0;
  std::unordered_set<c10::Device> devices;
  const auto look = [&](const at::Tensor& t, bool index) {
    if (!t.defined()) {
      return;
    }
    if (index && (t.scalar_type() == at::kBool || !on_device(t))) {
      waits_ = true;
    } else if (on_device(t) || t.dim() > 0) {
      devices.insert(t.device());
    }
  };
  for (size_t i = 0; i < count; ++i) {
    const auto& value = (*stack)[stack->size() - count + i];
    if (value.isTensor()) {
      look(value.toTensor(), false);
    } else if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorVector()) {
        look(t, false);
      }
    } else if (value.isList()) {
      for (const c10::IValue& item : value.toListRef()) {
        if (item.isTensor()) {
          look(item.toTensor(), indexes);
        }
      }
    }
  }
  if (name == "aten::repeat_interleave") {
    waits_ = stack->back().isNone();  // of a size that is told the device need not be asked
  }
  TORCH_CHECK(devices.size() < 2, name, ": expected all tensors to be on the same device");
  if (waits_ && !inside) {
    wait(name);
  }
  const bool was = std::exchange(inside, true);
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    inside = was;
    throw;
  }
  inside = was;
}

TORCH_LIBRARY(emulated, m) {
  m.def("say(bool yes) -> ()", [](bool yes) { says = yes; });
  m.def("capture(bool yes) -> ()", [](bool yes) { capturing = yes; });
  m.def("capturing() -> bool", [] { return capturing.load(); });
  m.def("use_float64(bool yes) -> ()", [](bool yes) { float64 = yes; });
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage_);
  m.impl("set_.source_Tensor", &set_tensor_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("histc", &histc);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(nll_loss, fp32)
  KERNEL_PRIVATEUSEONE(mse_loss, fp32)
}

const bool registered = [] {
  c10::SetAllocator(kDevice, &allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

}  // namespace
