// Memory and operations of the simulated CUDA device (tests/simulated_cuda): tensors on "cuda" lie in the host's memory,
// and every operation runs as the CPU's on the same memory. Loaded after torch, which has the device guard of device.cpp.
//
// As on a GPU: tensors of the host and of the device do not mix (numbers of no dimension and indices may), new memory holds
// no zeros (0xFF: NaN, -1), and reading a number or a copy to or from pageable memory waits for the device, which
// `simulated_cuda_sync_mode(2)` makes an error. host_memory.cpp is for the time of the host instead: it checks nothing and
// computes as little as can be, which is why the two share no code.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using c10::StorageImpl;
using StoragePtr = c10::intrusive_ptr<StorageImpl>;

std::atomic<int> sync_mode{0};  // 2: waiting is an error
std::atomic<int64_t> waits{0};

void wait(const char* what) {
  ++waits;
  TORCH_CHECK(sync_mode != 2, "called a synchronizing CUDA operation: ", what);
}

c10::Device current_device() {
  return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getDevice();
}

// ---- storages: one piece of memory, seen from the device and from the host

void release(void* context) { c10::intrusive_ptr<StorageImpl>::reclaim(static_cast<StorageImpl*>(context)); }

c10::DataPtr shared_data(const StoragePtr& owner, c10::Device device) {
  return {owner->mutable_data(), StoragePtr(owner).release(), &release, device};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto memory = c10::GetAllocator(c10::DeviceType::CPU)->allocate(bytes);
    if (bytes > 0) std::memset(memory.get(), 0xFF, bytes);
    auto owner = c10::make_intrusive<StorageImpl>(
        StorageImpl::use_byte_size_t(), bytes, std::move(memory), c10::GetAllocator(c10::DeviceType::CPU), true);
    return shared_data(owner, current_device());
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;
[[maybe_unused]] const bool set = (c10::SetAllocator(c10::DeviceType::CUDA, &allocator), true);

StoragePtr view_of_storage(const StoragePtr& storage, c10::Device device) {
  return c10::make_intrusive<StorageImpl>(
      StorageImpl::use_byte_size_t(), storage->nbytes(), shared_data(storage, device),
      device.is_cpu() ? c10::GetAllocator(c10::DeviceType::CPU) : &allocator, true);
}

at::Tensor tensor_on(const StoragePtr& storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

StoragePtr storage_of(const at::Tensor& tensor) { return tensor.storage().getWeakStorageImpl().lock(); }

// ---- one call: its device tensors as host tensors, and its results back on the device

class Call {
 public:
  Call(std::string name) : name_(std::move(name)) {}

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_cpu()) {
      host_tensors_ |= tensor.dim() > 0;
      return tensor;
    }
    if (!tensor.is_cuda()) return tensor;
    TORCH_CHECK(!device_.has_value() || *device_ == tensor.device(), name_,
                ": Expected all tensors to be on the same device, but found ", *device_, " and ", tensor.device());
    device_ = tensor.device();
    const auto found = aliases_.find(tensor.unsafeGetTensorImpl());
    if (found != aliases_.end()) return found->second;
    const StoragePtr own = storage_of(tensor);
    auto& storage = storages_[own.get()];
    if (!storage) {
      storage = view_of_storage(own, c10::Device(c10::DeviceType::CPU));
      originals_[storage.get()] = own;
    }
    const at::Tensor alias = tensor_on(storage, tensor, c10::DispatchKey::CPU);
    aliases_[tensor.unsafeGetTensorImpl()] = alias;
    from_alias_[alias.unsafeGetTensorImpl()] = tensor;
    return alias;
  }

  void use_device(c10::Device device) {
    if (!device_.has_value()) device_ = device.has_index() ? device : current_device();
  }

  void check_devices() const {
    static const std::set<std::string> free = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"};
    TORCH_CHECK(!host_tensors_ || !device_.has_value() || free.count(name_), name_,
                ": Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!");
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu() || !device_.has_value()) return tensor;
    const auto found = from_alias_.find(tensor.unsafeGetTensorImpl());
    if (found != from_alias_.end()) return found->second;
    const StoragePtr host = storage_of(tensor);
    auto& own = originals_[host.get()];
    if (!own) {
      own = view_of_storage(host, *device_);
      kept_.push_back(host);
    }
    return tensor_on(own, tensor, c10::DispatchKey::CUDA);
  }

  // What the call changed of the tensors themselves: sizes, and memory that grew.
  void update() {
    for (auto& [impl, alias] : aliases_) {
      const at::Tensor& tensor = from_alias_.at(alias.unsafeGetTensorImpl());
      const StoragePtr own = storage_of(tensor), host = storage_of(alias);
      if (own->data() != host->data() || own->nbytes() != host->nbytes()) {
        own->set_data_ptr(shared_data(host, *device_));
        own->set_nbytes(host->nbytes());
      }
      if (tensor.sizes() != alias.sizes() || tensor.strides() != alias.strides() ||
          tensor.storage_offset() != alias.storage_offset()) {
        impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
      }
    }
  }

 private:
  std::string name_;
  std::optional<c10::Device> device_;
  bool host_tensors_ = false;
  std::unordered_map<c10::TensorImpl*, at::Tensor> aliases_, from_alias_;
  std::unordered_map<StorageImpl*, StoragePtr> storages_, originals_;
  std::vector<StoragePtr> kept_;
};

template <class Convert>
void convert(c10::IValue& value, const Convert& change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& one : value.toTensorVector()) list.push_back(change(one));
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& one : value.toOptionalTensorVector())
      list.push_back(one.has_value() ? std::optional<at::Tensor>(change(*one)) : std::nullopt);
    value = list;
  }
}

// Operations whose result's size depends on the data: a GPU has to be asked for it.
bool waits_for_size(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
      "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::repeat_interleave.Tensor"};
  return names.count(name) > 0;
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name =
      schema.operator_name().overload_name.empty() ? schema.name() : schema.name() + "." + schema.overload_name();
  Call call(name);
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  if (waits_for_size(name)) wait(name.c_str());
  for (size_t i = begin; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isDevice() && value.toDevice().is_cuda()) {
      call.use_device(value.toDevice());
      value = c10::Device(c10::DeviceType::CPU);
    } else {
      if ((name == "aten::index.Tensor" || name.rfind("aten::index_put", 0) == 0) && value.isOptionalTensorList()) {
        for (const auto& index : value.toOptionalTensorVector())
          if (index.has_value() && index->defined() && index->scalar_type() == at::kBool) wait("indexing by a mask");
      }
      convert(value, [&](const at::Tensor& tensor) { return call.to_host(tensor); });
    }
  }
  call.check_devices();
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  call.update();
  const size_t results = schema.returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); ++i)
    convert((*stack)[i], [&](const at::Tensor& tensor) { return call.to_device(tensor); });
}

// ---- what makes memory, and copies between host and device

at::Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  const auto size = C10_AS_INTARRAYREF_SLOW(sizes), stride = C10_AS_INTARRAYREF_SLOW(strides);
  const auto type = c10::scalarTypeToTypeMeta(dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype())));
  const size_t bytes = at::detail::computeStorageNbytes(size, stride, type.itemsize());
  const c10::Device chosen = device.has_value() && device->has_index() ? *device : current_device();
  TORCH_CHECK(chosen.index() < c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).deviceCount(),
              "CUDA error: invalid device ordinal");
  auto memory = c10::GetAllocator(c10::DeviceType::CPU)->allocate(bytes);
  if (bytes > 0) std::memset(memory.get(), 0xFF, bytes);
  auto host = c10::make_intrusive<StorageImpl>(StorageImpl::use_byte_size_t(), bytes, std::move(memory),
                                               c10::GetAllocator(c10::DeviceType::CPU), true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(view_of_storage(host, chosen)),
                                                       c10::DispatchKeySet(c10::DispatchKey::CUDA), type);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return made;
}

at::Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                 std::optional<at::Device> device, std::optional<bool> pinned,
                 std::optional<at::MemoryFormat> format) {
  const auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  std::vector<int64_t> strides(size.size());
  int64_t next = 1;
  if (format.value_or(at::MemoryFormat::Contiguous) == at::MemoryFormat::ChannelsLast) {
    strides = c10::get_channels_last_strides_2d(size);
  } else if (format.value_or(at::MemoryFormat::Contiguous) == at::MemoryFormat::ChannelsLast3d) {
    strides = c10::get_channels_last_strides_3d(size);
  } else {
    for (size_t i = size.size(); i > 0; --i) {
      strides[i - 1] = next;
      next *= std::max<int64_t>(size[i - 1], 1);
    }
  }
  return empty_strided(sizes, c10::fromIntArrayRefSlow(strides), dtype, layout, device, pinned);
}

at::Tensor host_alias(const at::Tensor& tensor) {
  return tensor.is_cuda() ? tensor_on(view_of_storage(storage_of(tensor), c10::Device(c10::DeviceType::CPU)), tensor,
                                      c10::DispatchKey::CPU)
                          : tensor;
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.device() != source.device() && (self.is_cpu() || source.is_cpu()) && !non_blocking)
    wait(self.is_cpu() ? "a copy to the host" : "a copy from the host");
  at::AutoDispatchBelowADInplaceOrView guard;
  host_alias(self).copy_(host_alias(source));
  return self;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& destination, bool non_blocking) {
  at::Tensor to = destination;
  return copy_(to, source, non_blocking);
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  const at::Tensor alias = host_alias(self);
  alias.resize_(C10_AS_INTARRAYREF_SLOW(sizes), format);
  const StoragePtr own = storage_of(self), host = storage_of(alias);
  if (own->data() != host->data()) {
    own->set_data_ptr(shared_data(host, self.device()));
    own->set_nbytes(host->nbytes());
  }
  self.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef sizes,
                        at::IntArrayRef strides) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  std::vector<int64_t> own(strides.begin(), strides.end());
  if (own.size() != sizes.size()) {
    own.assign(sizes.size(), 1);
    for (size_t i = sizes.size(); i > 1; --i) own[i - 2] = own[i - 1] * std::max<int64_t>(sizes[i - 1], 1);
  }
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, own, offset);
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_storage(self, at::empty({0}, self.options()).storage(), 0, {0}, {1});
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const int64_t count = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(storage), 0, {count}, {1});
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("copy_", TORCH_FN(copy_));
  library.impl("_copy_from", TORCH_FN(copy_from));
  library.impl("resize_", TORCH_FN(resize_));
  library.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  library.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  library.impl("set_", TORCH_FN(set_nothing));
  // Composite operations that would choose a backend by the device.
  for (const char* name : {"convolution", "convolution_backward", "_convolution", "nonzero_static"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

}  // namespace

extern "C" void simulated_cuda_sync_mode(int mode) { sync_mode = mode; }
extern "C" int64_t simulated_cuda_waits() { return waits; }
extern "C" int simulated_cuda_get_sync_mode() { return sync_mode; }
extern "C" int simulated_cuda_current() { return current_device().index(); }
extern "C" void simulated_cuda_set(int index) {
  c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA)
      .setDevice(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)));
}
