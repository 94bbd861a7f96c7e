// A build of torch without CUDA has no such accelerator, yet autograd asks for its guard and hooks even on fake tensors.
// These do nothing for two cards, so fake cuda tensors go through forward, backward and update.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return 2; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }  // nothing is drawn
};
REGISTER_CUDA_HOOKS(CUDAHooks);
} // namespace at

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

Device card(Device device) {
  return {DeviceType::CUDA, device.index() < 0 ? DeviceIndex(0) : device.index()};
}

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 2; }
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const override { return {DeviceType::CUDA, 0}; }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, card(device)); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, card(device)); }
  Stream getNewStream(Device device, int) const override { return Stream(Stream::UNSAFE, card(device), 1); }
  Stream exchangeStream(Stream stream) const noexcept override {
    return Stream(Stream::DEFAULT, card(stream.device()));
  }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = (void*)1;
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
};

Guard guard;
c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
} // namespace
