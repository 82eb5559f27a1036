// What kernels.py calls, of `Device`, a kernel of CUTLASS, and `arguments` of the file that includes this.
#pragma once

// Bytes of workspace, -1 if this kernel does not take the sizes.
extern "C" int64_t workspace_bytes(const int64_t* sizes) {
  const Device::Arguments args = arguments(nullptr, nullptr, nullptr, nullptr, nullptr, sizes);
  if (Device::can_implement(args) != cutlass::Status::kSuccess) return -1;
  return static_cast<int64_t>(Device::get_workspace_size(args));
}

// Returns cutlass::Status: 0 is success.
extern "C" int run(const void* codes, const void* weight, const float* scale, const float* column_scale, void* out,
                   const int64_t* sizes, void* workspace, void* stream) {
  Device device;
  const auto on = static_cast<cudaStream_t>(stream);
  const auto args = arguments(codes, weight, scale, column_scale, out, sizes);
  const cutlass::Status status = device.initialize(args, workspace, on);
  return static_cast<int>(status == cutlass::Status::kSuccess ? device.run(on) : status);
}
