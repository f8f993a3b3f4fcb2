/* The few driver calls of weight sharing and of the MPS probe, for machines without a GPU.
 *
 * Compiled against NVIDIA's own cuda.h, so that structures and calls are checked against the real
 * ones: physical memory is a memfd, a handle its descriptor, access rights those of the pages.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define GRANULE (2u << 20)

static int attributes[256];
static char failing[64];
static CUresult failure;
static long num_handles, num_reservations, num_mappings;

/* As the header numbers them: a wrong number in the binding finds nothing supported. */
void fake_reset(void) {
  memset(attributes, 0, sizeof attributes);
  attributes[CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED] = 1;
  attributes[CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED] = 1;
  failing[0] = 0;
}
void fake_set_attribute(int attribute, int value) { attributes[attribute] = value; }
void fake_fail(const char *name, int code) {
  strncpy(failing, name, sizeof failing - 1);
  failure = (CUresult)code;
}
long fake_num_live(void) { return num_handles + num_reservations + num_mappings; }

#define FAIL_IF_TOLD() \
  if (!strcmp(failing, __func__)) return failure

CUresult CUDAAPI cuGetErrorName(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_NOT_PERMITTED ? "CUDA_ERROR_NOT_PERMITTED" : "CUDA_ERROR_OTHER";
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = NULL;
  return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice device) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attributes[attribute];
  if (attribute == CU_DEVICE_ATTRIBUTE_MPS_ENABLED) {
    /* A server is one whose control socket is there. */
    char path[4096];
    const char *folder = getenv("CUDA_MPS_PIPE_DIRECTORY");
    snprintf(path, sizeof path, "%s/control", folder ? folder : "/nowhere");
    *value = access(path, F_OK) == 0;
  }
  return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

static int is_exportable_device_memory(const CUmemAllocationProp *prop) {
  return prop->type == CU_MEM_ALLOCATION_TYPE_PINNED &&
         prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR &&
         prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE && prop->location.id == 0 &&
         prop->win32HandleMetaData == NULL && prop->allocFlags.compressionType == 0 &&
         prop->allocFlags.gpuDirectRDMACapable == 0 && prop->allocFlags.usage == 0;
}

CUresult CUDAAPI cuMemGetAllocationGranularity(size_t *granule, const CUmemAllocationProp *prop,
                                               CUmemAllocationGranularity_flags option) {
  if (!is_exportable_device_memory(prop) || option != CU_MEM_ALLOC_GRANULARITY_MINIMUM)
    return CUDA_ERROR_INVALID_VALUE;
  *granule = GRANULE;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size,
                             const CUmemAllocationProp *prop, unsigned long long flags) {
  FAIL_IF_TOLD();
  if (!is_exportable_device_memory(prop) || size % GRANULE || size == 0 || flags)
    return CUDA_ERROR_INVALID_VALUE;
  int fd = syscall(SYS_memfd_create, "fake-device-memory", 0);
  if (fd < 0 || ftruncate(fd, size)) return CUDA_ERROR_OUT_OF_MEMORY;
  *handle = fd;
  num_handles++;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemRelease(CUmemGenericAllocationHandle handle) {
  num_handles--;
  return close((int)handle) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment,
                                     CUdeviceptr wanted, unsigned long long flags) {
  if (size % GRANULE || alignment || wanted || flags) return CUDA_ERROR_INVALID_VALUE;
  void *found = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *address = (CUdeviceptr)found;
  num_reservations++;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemAddressFree(CUdeviceptr address, size_t size) {
  num_reservations--;
  return munmap((void *)address, size) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                          CUmemGenericAllocationHandle handle, unsigned long long flags) {
  FAIL_IF_TOLD();
  if (offset || flags || lseek((int)handle, 0, SEEK_END) != (off_t)size)
    return CUDA_ERROR_INVALID_VALUE;
  void *found = mmap((void *)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)handle, 0);
  if (found == MAP_FAILED) return CUDA_ERROR_INVALID_VALUE;
  num_mappings++;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemUnmap(CUdeviceptr address, size_t size) {
  num_mappings--;
  void *found =
      mmap((void *)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  return found == MAP_FAILED ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *rights,
                                size_t count) {
  FAIL_IF_TOLD();
  if (count != 1 || rights->location.type != CU_MEM_LOCATION_TYPE_DEVICE || rights->location.id)
    return CUDA_ERROR_INVALID_VALUE;
  int pages = rights->flags == CU_MEM_ACCESS_FLAGS_PROT_READ        ? PROT_READ
              : rights->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE ? PROT_READ | PROT_WRITE
                                                                    : PROT_NONE;
  return mprotect((void *)address, size, pages) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemExportToShareableHandle(void *shareable, CUmemGenericAllocationHandle handle,
                                              CUmemAllocationHandleType type,
                                              unsigned long long flags) {
  FAIL_IF_TOLD();
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || flags) return CUDA_ERROR_INVALID_VALUE;
  *(int *)shareable = dup((int)handle);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle,
                                                void *os_handle, CUmemAllocationHandleType type) {
  FAIL_IF_TOLD();
  int fd = dup((int)(long)os_handle);
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || fd < 0) return CUDA_ERROR_INVALID_VALUE;
  *handle = fd;
  num_handles++;
  return CUDA_SUCCESS;
}
