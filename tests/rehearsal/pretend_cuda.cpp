// A CUDA device made of host memory, for machines without a GPU: see pretend_cuda.py.
#include <ATen/ATen.h>
#include <torch/library.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <set>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
using namespace at;
static const Device CUDA0(DeviceType::CUDA, 0), CPU0(DeviceType::CPU);

// A storage on another device over the memory of this one, which it keeps alive.
static c10::Storage over(const c10::Storage& s, Device device) {
  auto* held = new c10::Storage(s);
  void* p = const_cast<void*>(s.data());
  DataPtr data(p, held, [](void* h) { delete static_cast<c10::Storage*>(h); }, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), s.nbytes(), std::move(data), c10::GetAllocator(DeviceType::CPU), true);
}
static Tensor on(const Tensor& t, c10::Storage s, DispatchKey key) {
  auto r = at::detail::make_tensor<TensorImpl>(std::move(s), DispatchKeySet(key), t.dtype());
  r.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) r.unsafeGetTensorImpl()->set_wrapped_number(true);
  return r;
}
static Tensor as_cpu(const Tensor& t) {
  return t.is_cuda() ? on(t, over(t.storage(), CPU0), DispatchKey::CPU) : t;
}
static Tensor as_cuda(const Tensor& t) { return on(t, over(t.storage(), CUDA0), DispatchKey::CUDA); }

struct Call {
  std::vector<std::pair<Tensor, Tensor>> seen;  // CUDA operand, its CPU form
  bool mixed = false;
  Tensor in(const Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) { mixed |= t.dim() > 0; return t; }
    seen.emplace_back(t, as_cpu(t));
    return seen.back().second;
  }
  IValue in(const IValue& v) {
    if (v.isTensor()) return in(v.toTensor());
    if (v.isTensorList()) { std::vector<Tensor> l; for (Tensor t : v.toTensorVector()) l.push_back(in(t)); return l; }
    if (v.isDevice() && v.toDevice().is_cuda()) return CPU0;
    if (v.isList()) {  // of optional tensors
      auto l = v.toList(); auto r = c10::impl::GenericList(l.elementType());
      for (size_t i = 0; i < l.size(); ++i) r.push_back(in(IValue(l.get(i))));
      return r;
    }
    return v;
  }
  Tensor out(const Tensor& t) {
    if (!t.defined() || t.is_cuda()) return t;
    for (auto& [cuda, cpu] : seen) {
      if (t.unsafeGetTensorImpl() == cpu.unsafeGetTensorImpl()) {  // written in place
        if (cuda.sizes() != cpu.sizes() || cuda.strides() != cpu.strides())
          cuda.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
        return cuda;
      }
      if (t.storage().unsafeGetStorageImpl() == cpu.storage().unsafeGetStorageImpl())  // a view
        return on(t, cuda.storage(), DispatchKey::CUDA);
    }
    return as_cuda(t);
  }
  IValue out(const IValue& v) {
    if (v.isTensor()) return out(v.toTensor());
    if (v.isTensorList()) { std::vector<Tensor> l; for (Tensor t : v.toTensorVector()) l.push_back(out(t)); return l; }
    return v;
  }
};
static void pretend(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> may_mix = {"aten::index", "aten::index_put_", "aten::_index_put_impl_",
    "aten::index_put", "aten::set_"};
  AutoDispatchBelowADInplaceOrView guard;
  auto n = op.schema().arguments().size();
  auto from = stack->size() - n;
  Call call;
  for (size_t i = from; i < stack->size(); ++i) (*stack)[i] = call.in((*stack)[i]);
  TORCH_CHECK(!(call.mixed && !call.seen.empty()) || may_mix.count(op.schema().name()), op.schema().name(),
    ": Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (pretended)");
  op.callBoxed(stack);
  for (auto& [cuda, cpu] : call.seen)  // an output that was resized
    if (cpu.storage().data() != cuda.storage().data()) {
      auto grown = over(cpu.storage(), CUDA0);
      auto* impl = cuda.storage().unsafeGetStorageImpl();
      impl->set_nbytes(grown.nbytes());
      impl->set_data_ptr_noswap(std::move(grown.unsafeGetStorageImpl()->mutable_data_ptr()));
    }
  auto m = op.schema().returns().size();
  for (size_t i = stack->size() - m; i < stack->size(); ++i) (*stack)[i] = call.out((*stack)[i]);
}
static Tensor& pretend_copy(Tensor& self, const Tensor& src, bool) {
  AutoDispatchBelowADInplaceOrView guard;
  as_cpu(self).copy_(as_cpu(src));
  return self;
}
static Tensor& set_storage(Tensor& self, c10::Storage s, c10::SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(s));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  std::vector<int64_t> strides(stride.size() ? C10_AS_INTARRAYREF_SLOW(stride).vec() : std::vector<int64_t>(sizes.size(), 1));
  if (!stride.size()) for (int i = int(sizes.size()) - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  impl->set_sizes_and_strides(sizes, strides, offset.guard_int(__FILE__, __LINE__));
  return self;
}
static Tensor& set_tensor(Tensor& self, const Tensor& src) {
  return set_storage(self, src.storage(), src.sym_storage_offset(), src.sym_sizes(), src.sym_strides());
}
static void pretend_record_stream(Tensor&, Stream) {}

// One device with one stream; events do nothing.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return CUDA0; }
  Device getDevice() const override { return CUDA0; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, CUDA0); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, CUDA0); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, CUDA0); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
static std::set<const void*> pinned;
struct Pinned final : Allocator {
  DataPtr allocate(size_t n) override {
    auto* held = new DataPtr(c10::GetAllocator(DeviceType::CPU)->allocate(n));
    pinned.insert(held->get());
    return {held->get(), held, [](void* h) { pinned.erase(static_cast<DataPtr*>(h)->get()); delete static_cast<DataPtr*>(h); }, CPU0};
  }
  DeleterFnPtr raw_deleter() const override { return c10::GetAllocator(DeviceType::CPU)->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
// torch asks these whether there is an accelerator, for pinned memory and for generators (here the CPU's).
struct Hooks final : CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  long versionCuDNN() const override { return 0; }
  long versionRuntimeCuDNN() const override { return 0; }
  bool isPinnedPtr(const void* p) const override { return pinned.count(p); }
  Allocator* getPinnedMemoryAllocator() const override { static Pinned a; return &a; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};
static int hooks = [] {  // torch may have made its own already: these have no members, so their table of methods is all
  auto* ours = new Hooks;
  std::memcpy(const_cast<void*>(static_cast<const void*>(&at::detail::getCUDAHooks())), ours, sizeof(void*));
  return 0;
}();
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&pretend>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", TORCH_FN(pretend_copy));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("record_stream", TORCH_FN(pretend_record_stream));
  // Whatever the CPU has a kernel of its own for: the fallback alone would come behind composite kernels.
  static const std::set<std::string> own = {"copy_", "set_.source_Storage_storage_offset", "set_.source_Tensor",
    "record_stream"};
  for (auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    if (full.rfind("aten::", 0) || own.count(full.substr(6))) continue;
    auto op = c10::Dispatcher::singleton().findOp(name);
    if (op && (op->hasKernelForDispatchKey(DispatchKey::CPU) || op->hasKernelForDispatchKey(DispatchKey::CUDA)))
      m.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&pretend>());
  }
}
// The CUDA build's kernel has a backward pass that no CPU has.
static std::tuple<Tensor, Tensor> pretend_rms_norm(const Tensor& x, IntArrayRef shape, const std::optional<Tensor>& weight,
                                           std::optional<double> eps) {
  std::vector<int64_t> dims;
  for (size_t i = 1; i <= shape.size(); ++i) dims.push_back(-int64_t(i));
  auto wide = x.to(x.scalar_type() == kDouble ? kDouble : kFloat);
  auto scale = wide.pow(2).mean(dims, true).add(eps.value_or(1.1920929e-7)).rsqrt();
  auto y = wide * scale;
  return {(weight.has_value() ? y * *weight : y).type_as(x), scale};
}
TORCH_LIBRARY_IMPL(aten, AutogradCUDA, m) { m.impl("_fused_rms_norm", TORCH_FN(pretend_rms_norm)); }
TORCH_LIBRARY(pretend_cuda, m) { m.def("as_cpu(Tensor t) -> Tensor", &as_cpu); m.def("as_cuda(Tensor t) -> Tensor", &as_cuda); }
