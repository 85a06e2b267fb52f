/* A stand-in for the CUDA driver of a machine with one Orin, held to the real prototypes by cuda.h.
   It answers what a driver answers and prints what it is asked; nothing computes. INIT is what cuInit returns. */
#include <cuda.h>
#include <stdio.h>
#include <string.h>

#ifndef INIT
#define INIT CUDA_SUCCESS
#endif

static int graph, launchable, context;

CUresult CUDAAPI cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : INIT; }

CUresult CUDAAPI cuGetErrorName(CUresult error, const char **name) {
  *name = error == CUDA_ERROR_NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_INVALID_VALUE";
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDriverGetVersion(int *version) {
  *version = 12060;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
  *device = 40 + ordinal;
  return ordinal ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetName(char *name, int length, CUdevice device) {
  strncpy(name, "Orin", length);
  return device == 40 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuDeviceTotalMem(size_t *bytes, CUdevice device) {
  *bytes = 7990000000;
  return device == 40 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (device != 40) return CUDA_ERROR_INVALID_VALUE;
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? 8
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 7
                                                                       : -1;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device) {
  *out = (CUcontext)&context;
  return device == 40 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext given) {
  printf("current %d\n", given == (CUcontext)&context);
  fflush(stdout);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
  printf("begin %p %d\n", (void *)stream, mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
  fflush(stdout);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuStreamEndCapture(CUstream stream, CUgraph *out) {
  *out = (CUgraph)&graph;
  return stream == (CUstream)0x7f1234567890 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph given, unsigned long long flags) {
  *out = (CUgraphExec)&launchable;
  return given == (CUgraph)&graph && !flags ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuGraphDestroy(CUgraph given) {
  return given == (CUgraph)&graph ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuGraphLaunch(CUgraphExec given, CUstream stream) {
  printf("launch %d %p\n", given == (CUgraphExec)&launchable, (void *)stream);
  fflush(stdout);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec given) {
  printf("destroy %d\n", given == (CUgraphExec)&launchable);
  fflush(stdout);
  return CUDA_SUCCESS;
}
