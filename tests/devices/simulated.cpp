// Gives torch the device guard, the hooks and the generators of CUDA or MPS, with two devices that compute nothing.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#ifdef SIMULATE_CUDA
constexpr auto KIND = c10::DeviceType::CUDA;
using Interface = at::CUDAHooksInterface;
#else
constexpr auto KIND = c10::DeviceType::MPS;
using Interface = at::MPSHooksInterface;
#endif

constexpr c10::DeviceIndex DEVICES = 2;
thread_local c10::DeviceIndex current = 0;

static c10::DeviceIndex exchange(c10::DeviceIndex index) {
  auto before = current;
  current = index;
  return before;
}

// Operations on a device are complete when they return, so streams and events do nothing.
struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device device) const override { return {KIND, exchange(device.index())}; }
  c10::Device getDevice() const override { return {KIND, current}; }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, {KIND, device.index() < 0 ? c10::DeviceIndex(0) : device.index()});
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

struct Generator : public at::CPUGeneratorImpl {
  explicit Generator(c10::Device device) : at::CPUGeneratorImpl(c10::detail::getNonDeterministicRandom()) {
    device_ = device;
  }
};

struct Hooks : public Interface {
  Hooks() = default;
  template <typename Arguments> explicit Hooks(Arguments) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current = index; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return exchange(index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchange(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index = -1) const override {
    return at::make_generator<Generator>(c10::Device(KIND, index < 0 ? c10::DeviceIndex(0) : index));
  }
#ifdef SIMULATE_CUDA
  bool hasCUDA() const override { return true; }
  c10::DeviceIndex current_device() const override { return current; }
  int getNumGPUs() const override { return DEVICES; }
#else
  bool hasMPS() const override { return true; }
#endif
};

// The macros need names without a namespace.
namespace c10 {
#ifdef SIMULATE_CUDA
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
#else
C10_REGISTER_GUARD_IMPL(MPS, Guard);
#endif
}
namespace at {
#ifdef SIMULATE_CUDA
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
#else
C10_REGISTER_CLASS(MPSHooksRegistry, MPSHooks, Hooks)
#endif
}
