// A stand-in accelerator: PyTorch's PrivateUse1 backend in host memory.
//
// Every kernel runs on the CPU, on an alias of the device tensor's memory. What is
// checked is what CUDA checks: all tensors on one device (0-dim CPU tensors only where
// CUDA takes them), a generator of the device. Launches, and waits of the host for the
// device ("syncs"), are counted.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/multinomial_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <unordered_map>
#include <unordered_set>

namespace py = pybind11;
using at::IntArrayRef;
using at::Tensor;
using c10::DeviceIndex;
using std::optional;
using std::string;

constexpr auto STANDIN = c10::DeviceType::PrivateUse1;
static const c10::Device DEVICE(STANDIN, 0);

static bool on_device(const Tensor& t) { return t.device().type() == STANDIN; }

// ---- Counters, and a function of Python's that is called with (kind, operation).

static std::atomic<int64_t> launches{0}, syncs{0};
static PyObject* hook = nullptr;
static thread_local bool in_hook = false;

static void call_hook(const char* kind, const string& operation) {
  py::gil_scoped_acquire gil;
  in_hook = true;
  PyObject* result = PyObject_CallFunction(hook, "ss", kind, operation.c_str());
  in_hook = false;
  if (result) Py_DECREF(result);
  else PyErr_WriteUnraisable(hook);
}

static void launch(const string& operation) {
  if (in_hook) return;
  launches++;
  if (hook) call_hook("launch", operation);
}

static void sync(const string& operation) {
  if (in_hook) return;
  syncs++;
  if (hook) call_hook("sync", operation);
}

// ---- Memory of the host, counted as the device's.

static std::atomic<int64_t> allocated{0}, peak{0};

static void count_bytes(size_t n) {
  const int64_t now = allocated += n;
  int64_t highest = peak;
  while (now > highest && !peak.compare_exchange_weak(highest, now)) {}
}

// What a device pointer holds: a block of its own, or a storage of the CPU's.
struct Held {
  void* block;
  c10::Storage storage;
  size_t bytes;
};

static void release(void* context) {
  auto* held = static_cast<Held*>(context);
  allocated -= held->bytes;
  if (held->block) c10::free_cpu(held->block);
  delete held;
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t n) override {
    if (!n) return {nullptr, nullptr, &release, DEVICE};
    auto* held = new Held{c10::alloc_cpu(n), {}, n};
    count_bytes(n);
    return {held->block, held, &release, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t n) const override {
    default_copy_data(to, from, n);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* bytes : {&stats.allocated_bytes, &stats.reserved_bytes}) {
      (*bytes)[0].current = allocated;
      (*bytes)[0].peak = peak;
    }
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex) override {
    const size_t total = size_t{1} << 34;
    return {total - allocated, total};
  }
  void resetPeakStats(DeviceIndex) override { peak = allocated.load(); }
};
static Allocator allocator;
REGISTER_ALLOCATOR(STANDIN, &allocator)

// ---- One device, one stream, events that do nothing.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static void check(c10::Device device) {
    TORCH_CHECK(device.index() <= 0,
                "invalid device ordinal: there is one device, got ", device);
  }
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::DeviceType type() const override { return STANDIN; }
  c10::Device exchangeDevice(c10::Device device) const override {
    check(device);
    return DEVICE;
  }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device device) const override { check(device); }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    return stream();
  }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { sync("stream"); }
  void synchronizeEvent(void*) const override { sync("event"); }
  void synchronizeDevice(const DeviceIndex) const override { sync("device"); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---- A generator of the device; inside of it one of the CPU, which kernels use.

struct Generator final : c10::GeneratorImpl {
  at::Generator cpu = at::detail::createCPUGenerator();
  Generator()
      : GeneratorImpl(DEVICE, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "no offset"); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  c10::GeneratorImpl* clone_impl() const override {
    auto* copy = new Generator;
    copy->cpu = cpu.clone();
    return copy;
  }
};

static const at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<Generator>();
  return generator;
}

static at::Generator cpu_generator(const optional<at::Generator>& named) {
  const bool is_named = named && named->defined();
  const at::Generator& generator = is_named ? *named : default_generator();
  TORCH_CHECK(generator.device().type() == STANDIN,
              "Expected a 'standin' device type for generator but found '",
              generator.device().type(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
  at::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetAllocator(c10::kCPU);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), n);
  }
};

// ---- The same memory as a tensor of the CPU's, and back; valid for one operation.

struct Aliases {
  std::unordered_map<c10::StorageImpl*, c10::Storage> cpu_of, device_of;
  std::unordered_map<c10::TensorImpl*, Tensor> originals;  // of CPU tensors made here

  static Tensor view_of(const c10::Storage& storage, c10::DispatchKey key,
                        const Tensor& like) {
    auto view = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                      like.storage_offset());
    return view;
  }

  void remember(const c10::Storage& cpu, const c10::Storage& device) {
    cpu_of.emplace(device.unsafeGetStorageImpl(), cpu);
    device_of.emplace(cpu.unsafeGetStorageImpl(), device);
  }

  Tensor to_cpu(const Tensor& tensor) {
    auto device = tensor.storage();
    auto* impl = device.unsafeGetStorageImpl();
    if (!cpu_of.count(impl)) {
      auto drop = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
      c10::DataPtr pointer(impl->mutable_data(), new c10::Storage(device), drop,
                           c10::Device(c10::kCPU));
      remember(c10::Storage(c10::Storage::use_byte_size_t(), device.nbytes(),
                            std::move(pointer), c10::GetAllocator(c10::kCPU), true),
               device);
    }
    auto cpu = view_of(cpu_of.at(impl), c10::DispatchKey::CPU, tensor);
    cpu._set_conj(tensor.is_conj());
    cpu._set_neg(tensor.is_neg());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number())
      cpu.unsafeGetTensorImpl()->set_wrapped_number(true);
    originals.emplace(cpu.unsafeGetTensorImpl(), tensor);
    return cpu;
  }

  Tensor to_device(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    auto original = originals.find(tensor.unsafeGetTensorImpl());
    if (original != originals.end()) return original->second;
    auto cpu = tensor.storage();
    auto* impl = cpu.unsafeGetStorageImpl();
    if (!device_of.count(impl)) {
      const size_t n = cpu.nbytes();
      count_bytes(n);
      c10::DataPtr pointer(impl->mutable_data(), new Held{nullptr, cpu, n}, &release,
                           DEVICE);
      remember(cpu, c10::Storage(c10::Storage::use_byte_size_t(), n,
                                 std::move(pointer), &allocator, true));
    }
    return view_of(device_of.at(impl), c10::DispatchKey::PrivateUse1, tensor);
  }
};

// ---- Any operation: check its arguments, run the CPU's kernel, take the results back.

// operations whose wrapper on CUDA does not check devices: the kernel does, and takes
// 0-dim tensors of the CPU
static std::unordered_set<string> takes_scalars;

// operations whose result has a size, or is a number, that only the device knows
static const std::unordered_set<string> waits = {
    "aten::nonzero",        "aten::masked_select",
    "aten::unique_dim",     "aten::_unique",
    "aten::_unique2",       "aten::unique_consecutive",
    "aten::bincount",       "aten::unique_dim_consecutive",
    "aten::equal",          "aten::masked_select_backward",
};

struct Call {
  const c10::FunctionSchema& schema;
  const string& name;
  const string full_name;
  torch::jit::Stack* stack;
  const size_t start;  // of the arguments on the stack
  Aliases aliases;
  std::vector<std::pair<Tensor, Tensor>> written;  // (of the device, its alias)

  static string full(const c10::FunctionSchema& schema) {
    const string& overload = schema.overload_name();
    return overload.empty() ? schema.name() : schema.name() + "." + overload;
  }

  Call(const c10::OperatorHandle& operation, torch::jit::Stack* stack)
      : schema(operation.schema()),
        name(schema.name()),
        full_name(full(schema)),
        stack(stack),
        start(stack->size() - schema.arguments().size()) {}

  c10::IValue& value(size_t i) { return (*stack)[start + i]; }

  // As CUDA, take a tensor of the CPU's as an index or as a scalar, else refuse it.
  void check_cpu_tensor(const Tensor& tensor, const string& argument, bool is_written) {
    const bool indexes = name == "aten::_index_put_impl_" || name == "aten::index";
    if (indexes && argument == "indices" && tensor.device().is_cpu()) {
      // of aten::index the meta function has copied it, which was counted
      if (name != "aten::index") sync("copy of an index to the device");
      return;
    }
    const bool is_scalar = tensor.device().is_cpu() && tensor.dim() == 0;
    const bool is_foreach = name.rfind("aten::_foreach_", 0) == 0;
    const bool allowed = takes_scalars.count(full_name.substr(6)) && !is_written;
    TORCH_CHECK(is_scalar && (allowed || is_foreach),
                "Expected all tensors to be on the same device, but got ", argument,
                " is on ", tensor.device(), ", different from other tensors on ",
                DEVICE, " (when checking argument in method standin_", full_name, ")");
  }

  Tensor alias(const Tensor& tensor, size_t i) {
    if (!tensor.defined()) return tensor;
    const auto& argument = schema.arguments()[i];
    const bool is_written = argument.alias_info() && argument.alias_info()->isWrite();
    if (!on_device(tensor)) {
      check_cpu_tensor(tensor, argument.name(), is_written);
      return tensor;
    }
    Tensor cpu = aliases.to_cpu(tensor);
    if (is_written) written.emplace_back(tensor, cpu);
    return cpu;
  }

  void alias_argument(size_t i) {
    c10::IValue& v = value(i);
    if (v.isTensor()) {
      v = alias(v.toTensor(), i);
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : v.toTensorVector()) list.push_back(alias(tensor, i));
      v = list;
    } else if (v.isOptionalTensorList()) {
      c10::List<optional<Tensor>> list;
      for (const auto& tensor : v.toOptionalTensorVector())
        list.push_back(tensor ? optional<Tensor>(alias(*tensor, i)) : tensor);
      v = list;
    } else if (v.isGenerator()) {
      v = cpu_generator(v.toGenerator());
    } else if (v.isNone() &&
               schema.arguments()[i].type()->str().find("Generator") != string::npos) {
      v = cpu_generator(std::nullopt);
    } else if (v.isDevice() && v.toDevice().type() == STANDIN) {
      v = c10::Device(c10::kCPU);
    }
  }

  // x[mask] = y fills on CUDA if y is one number; else it waits for nonzero.
  void count_masks() {
    if (name != "aten::_index_put_impl_") return;
    const bool fills = value(2).toTensor().numel() == 1 && !value(3).toBool();
    if (fills) return;
    for (const auto& index : value(1).toOptionalTensorVector()) {
      if (!index || !index->defined()) continue;
      const auto kind = index->scalar_type();
      if (kind != at::kBool && kind != at::kByte) continue;
      launch("aten::nonzero (mask of index_put)");
      sync("aten::nonzero (mask of index_put)");
    }
  }

  void count() {
    count_masks();
    launch(full_name);
    const bool counts = name == "aten::repeat_interleave" && stack->back().isNone();
    if (counts || waits.count(name)) sync(full_name);
  }

  // A tensor that was resized has new memory on the CPU: copy it back.
  void copy_resized() {
    for (auto& [tensor, cpu] : written) {
      const bool same_memory = cpu.storage().data() == tensor.storage().data();
      if (same_memory && cpu.sizes() == tensor.sizes()) continue;
      at::native::resize_(tensor, cpu.sizes());
      tensor.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(),
                                                          tensor.storage_offset());
      if (cpu.numel()) Aliases().to_cpu(tensor).copy_(cpu);
    }
  }

  void take_results() {
    const size_t n = schema.returns().size();
    for (size_t i = stack->size() - n; i < stack->size(); i++) {
      c10::IValue& v = (*stack)[i];
      if (v.isTensor()) {
        v = aliases.to_device(v.toTensor());
      } else if (v.isTensorList()) {
        c10::List<Tensor> list;
        for (const Tensor& t : v.toTensorVector()) list.push_back(aliases.to_device(t));
        v = list;
      }
    }
  }
};

static void run_on_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  Call call(operation, stack);
  call.count();
  for (size_t i = 0; i < call.schema.arguments().size(); i++) call.alias_argument(i);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    operation.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.copy_resized();
  call.take_results();
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

// ---- What must be of the device itself: factories, copies, views.

static Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype,
                    optional<at::Layout>, optional<at::Device> device, optional<bool>,
                    optional<at::MemoryFormat> format) {
  if (device) Guard::check(*device);
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype),
                                   format);
}

static Tensor empty_strided(IntArrayRef size, IntArrayRef stride,
                            optional<at::ScalarType> dtype, optional<at::Layout>,
                            optional<at::Device> device, optional<bool>) {
  if (device) Guard::check(*device);
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys,
                                           c10::dtype_or_default(dtype));
}

static Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (!to.numel()) return to;
  if (!on_device(to)) sync("copy to the host");
  else if (on_device(from) || non_blocking) launch("aten::copy_");
  else sync("copy to the device");
  Aliases aliases;
  at::AutoDispatchBelowADInplaceOrView below;
  (on_device(to) ? aliases.to_cpu(to) : to)
      .copy_(on_device(from) ? aliases.to_cpu(from) : from);
  return to;
}

static Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

static at::Scalar to_number(const Tensor& tensor) {
  sync("aten::_local_scalar_dense");
  at::AutoDispatchBelowADInplaceOrView below;
  return at::_local_scalar_dense(Aliases().to_cpu(tensor));
}

static Tensor& set_storage(Tensor& tensor, c10::Storage storage, int64_t offset,
                           IntArrayRef size, IntArrayRef stride) {
  at::native::checkSetStorage(tensor, storage, offset, size, stride);
  tensor.unsafeGetTensorImpl()->set_storage_offset(offset);
  const auto strides = stride.data() ? std::make_optional(stride) : std::nullopt;
  at::native::resize_impl_cpu_(tensor.unsafeGetTensorImpl(), size, strides, true);
  return tensor;
}

static Tensor& set_all_of_storage(Tensor& tensor, c10::Storage storage) {
  const auto n = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return set_storage(tensor, storage, 0, {n}, {});
}

static Tensor& set_tensor(Tensor& tensor, const Tensor& other) {
  if (tensor.is_same(other)) return tensor;
  return set_storage(tensor, other.storage(), other.storage_offset(), other.sizes(),
                     other.strides());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", to_number);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage", set_all_of_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("multinomial", at::native::multinomial);  // composed, as on CUDA
  m.impl("multinomial.out", at::native::multinomial_out);
}

// ---- Attention: one kernel, as on CUDA.

static int64_t choose_attention(const Tensor& query, const Tensor& key,
                                const Tensor& value, const optional<Tensor>& mask,
                                double dropout, bool is_causal, optional<double> scale,
                                bool enable_gqa) {
  Aliases aliases;
  auto cpu_mask = mask ? std::make_optional(aliases.to_cpu(*mask)) : std::nullopt;
  const int64_t choice = at::native::_fused_sdp_choice_cpp(
      aliases.to_cpu(query), aliases.to_cpu(key), aliases.to_cpu(value), cpu_mask,
      dropout, is_causal, scale, enable_gqa);
  const bool is_fused = choice == static_cast<int64_t>(at::SDPBackend::flash_attention);
  return static_cast<int64_t>(is_fused ? at::SDPBackend::overrideable
                                       : at::SDPBackend::math);
}

static void check_attention(std::initializer_list<const Tensor*> tensors) {
  for (auto* tensor : tensors)
    TORCH_CHECK(!tensor->defined() || on_device(*tensor),
                "Expected all tensors to be on the same device, attention got ",
                tensor->device());
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor,
                  Tensor, Tensor>
attention(const Tensor& query, const Tensor& key, const Tensor& value,
          const optional<Tensor>& mask, double dropout, bool is_causal, bool,
          optional<double> scale) {
  check_attention({&query, &key, &value});
  if (mask) check_attention({&*mask});
  launch("attention");
  Aliases aliases;
  at::AutoDispatchBelowADInplaceOrView below;
  auto cpu_mask = mask ? std::make_optional(aliases.to_cpu(*mask)) : std::nullopt;
  auto [output, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
      aliases.to_cpu(query), aliases.to_cpu(key), aliases.to_cpu(value), dropout,
      is_causal, cpu_mask, scale);
  Tensor none = at::empty({0}, query.options().dtype(at::kLong));
  return {aliases.to_device(output), aliases.to_device(logsumexp), none, none,
          query.size(2), key.size(2), none, none, none};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& mask, std::array<bool, 4>, const Tensor& output,
    const Tensor& logsumexp, const Tensor&, const Tensor&, int64_t, int64_t,
    double dropout, bool is_causal, const Tensor&, const Tensor&,
    optional<double> scale) {
  check_attention({&grad, &query, &key, &value, &mask, &output, &logsumexp});
  launch("attention_backward");
  Aliases aliases;
  at::AutoDispatchBelowADInplaceOrView below;
  auto cpu_mask =
      mask.defined() ? std::make_optional(aliases.to_cpu(mask)) : std::nullopt;
  auto [of_query, of_key, of_value] =
      at::_scaled_dot_product_flash_attention_for_cpu_backward(
          aliases.to_cpu(grad), aliases.to_cpu(query), aliases.to_cpu(key),
          aliases.to_cpu(value), aliases.to_cpu(output), aliases.to_cpu(logsumexp),
          dropout, is_causal, cpu_mask, scale);
  return {aliases.to_device(of_query), aliases.to_device(of_key),
          aliases.to_device(of_value), Tensor()};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_scaled_dot_product_fused_attention_overrideable", attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward",
         attention_backward);
}
namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}

// ---- Autocast, with CUDA's lists.

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}
namespace at::autocast {
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define OUTPUT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
#define NORM(...) KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE(__VA_ARGS__)
  AT_FORALL_LOWER_PRECISION_FP(LOW)
  AT_FORALL_FP32(FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(OUTPUT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(NORM)
  AT_FORALL_PROMOTE(WIDEST)
}
}

// ---- For Python.

static std::vector<std::unique_ptr<torch::Library>> libraries;

// Kernels that CUDA has of its own, and that are composed of others elsewhere.
static void add_kernels(const std::vector<string>& operations) {
  libraries.push_back(std::make_unique<torch::Library>(
      torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__));
  for (const auto& operation : operations)
    libraries.back()->impl(operation.c_str(),
                           torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

static void set_hook(py::object function) {
  PyObject* earlier = hook;
  hook = function.is_none() ? nullptr : function.release().ptr();
  Py_XDECREF(earlier);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("init", [](std::unordered_set<string> names, std::vector<string> kernels) {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
    takes_scalars = std::move(names);
    add_kernels(kernels);
  });
  m.def("launches", [] { return launches.load(); });
  m.def("syncs", [] { return syncs.load(); });
  m.def("reset", [] { launches = syncs = 0; });
  m.def("memory", [] { return std::make_pair(allocated.load(), peak.load()); });
  m.def("reset_peak", [] { peak = allocated.load(); });
  m.def("set_hook", set_hook);
  m.def("manual_seed", [](uint64_t seed) {
    at::Generator generator = default_generator();
    generator.set_current_seed(seed);
  });
  m.def("initial_seed", [] { return default_generator().current_seed(); });
}
