// Preloaded before torch: its accelerator is CUDA, which a build decides when it is compiled.
#include <cstdint>
#include <optional>

namespace c10 {
enum class DeviceType : int8_t { CPU = 0, CUDA = 1 };
}
namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
} // namespace at::accelerator
