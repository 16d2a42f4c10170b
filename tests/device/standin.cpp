// Two devices that are none, under torch's dispatch key of CUDA, for a build of torch that has only the CPU.
//
// Device memory is one file in memory, mapped twice: tensors carry addresses of a mapping that nobody may touch, kernels add
// the distance to the other one. Whoever reads a device tensor on the host by mistake dies of it. Every operator that the CPU
// has is registered for the devices, and runs on the CPU's tensors over the same memory.
//
// Time is the number of kernels so far. A copy to pinned memory arrives when its event, or a wait, says so: until then the
// destination holds NaN. Whatever would make a host wait for a real device is counted, and raises on demand or while a
// "graph" is captured.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <climits>
#include <list>
#include <map>
#include <mutex>
#include <set>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;
using Lock = std::lock_guard<std::recursive_mutex>;

constexpr DeviceIndex kDevices = 2;
constexpr size_t kRoom = size_t(1) << 30;  // bytes of each device
constexpr size_t kGrain = 256;

struct Letter {  // a copy on its way to pinned memory
  long sent;
  Tensor to, content;
};

struct World {
  std::recursive_mutex lock;
  char* closed;  // what tensors point to
  char* open;  // the same memory, as kernels see it
  size_t top[kDevices] = {};
  size_t used[kDevices] = {};
  std::map<size_t, std::vector<char*>> vacant[kDevices];
  std::map<char*, size_t> sizes;
  std::map<char*, size_t> pinned;
  std::list<Letter> letters;
  long now = 0, lag = 0, peak = 0, launches = 0;
  long waits = 0, event_waits = 0, questions = 0;
  bool raises = false, captures = false, without_float64 = false;
  std::set<std::string> missing;
  std::map<std::string, long> reasons;

  World() {
    int file = memfd_create("device", 0);
    TORCH_CHECK(file >= 0 && ftruncate(file, kDevices * kRoom) == 0, "stand-in: no memory");
    open = static_cast<char*>(mmap(nullptr, kDevices * kRoom, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    closed = static_cast<char*>(
        mmap(nullptr, kDevices * kRoom, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    TORCH_CHECK(open != MAP_FAILED && closed != MAP_FAILED, "stand-in: no addresses");
    close(file);
  }
};

World& world() {
  static World* one = new World;
  return *one;
}

thread_local DeviceIndex device_now = 0;
thread_local int64_t stream_now[kDevices] = {};

DeviceIndex index_of(Device device) { return device.index() < 0 ? device_now : device.index(); }

struct On {  // the current device, for a while
  DeviceIndex before = device_now;
  explicit On(DeviceIndex device) { device_now = device; }
  ~On() { device_now = before; }
};

// Memory.

void give_back(void* address) {
  if (address == nullptr) return;
  auto& w = world();
  Lock lock(w.lock);
  auto* at = static_cast<char*>(address);
  auto device = (at - w.closed) / static_cast<ptrdiff_t>(kRoom);
  size_t size = w.sizes.at(at);
  w.used[device] -= size;
  w.vacant[device][size].push_back(at);
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t wanted) override {
    auto& w = world();
    Lock lock(w.lock);
    DeviceIndex device = device_now;
    size_t size = (wanted + kGrain - 1) / kGrain * kGrain;
    if (size == 0) return {nullptr, nullptr, &give_back, Device(DeviceType::CUDA, device)};
    auto& vacant = w.vacant[device][size];
    char* at;
    if (vacant.empty()) {
      TORCH_CHECK(w.top[device] + size <= kRoom, "stand-in: the device is out of memory");
      at = w.closed + device * kRoom + w.top[device];
      w.top[device] += size;
      w.sizes[at] = size;
    } else {
      at = vacant.back();
      vacant.pop_back();
    }
    w.used[device] += size;
    w.peak = std::max<long>(w.peak, w.used[0] + w.used[1]);
    memset(at - w.closed + w.open, 0xFF, size);  // NaN until somebody writes
    return {at, at, &give_back, Device(DeviceType::CUDA, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t size) const override {
    auto& w = world();
    memmove(static_cast<char*>(to) - w.closed + w.open, static_cast<const char*>(from) - w.closed + w.open, size);
  }
};

void unpin(void* address) {
  auto& w = world();
  Lock lock(w.lock);
  w.pinned.erase(static_cast<char*>(address));
  free(address);
}

struct PinnedMemory final : at::HostAllocator {
  c10::DataPtr allocate(size_t wanted) override {
    auto& w = world();
    Lock lock(w.lock);
    size_t size = (wanted / kGrain + 1) * kGrain;
    auto* at = static_cast<char*>(aligned_alloc(kGrain, size));
    w.pinned[at] = size;
    return {at, at, &unpin, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t size) const override { memmove(to, from, size); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

DeviceMemory& device_memory() {
  static DeviceMemory* one = new DeviceMemory;
  return *one;
}
PinnedMemory& pinned_memory() {
  static PinnedMemory* one = new PinnedMemory;
  return *one;
}

bool is_pinned(const void* address) {
  auto& w = world();
  Lock lock(w.lock);
  auto* at = static_cast<const char*>(address);
  auto after = w.pinned.upper_bound(const_cast<char*>(at));
  return after != w.pinned.begin() && at < std::prev(after)->first + std::prev(after)->second;
}

// Time.

void deliver(long until) {
  auto& w = world();
  std::list<Letter> come;
  {
    Lock lock(w.lock);
    while (!w.letters.empty() && w.letters.front().sent <= until) come.splice(come.end(), w.letters, w.letters.begin());
  }
  for (auto& letter : come) {
    c10::InferenceMode guard;
    letter.to.copy_(letter.content);
  }
}

void refuse_in_capture(const std::string& what) {
  TORCH_CHECK(!world().captures, "operation not permitted when stream is capturing: ", what);
}

void wait_for_device(const std::string& what) {
  auto& w = world();
  {
    Lock lock(w.lock);
    w.waits++;
    w.reasons[what]++;
  }
  refuse_in_capture(what);
  TORCH_CHECK(!w.raises, "this waits for the device: ", what);
  deliver(LONG_MAX);
}

long tick() {
  auto& w = world();
  Lock lock(w.lock);
  return ++w.now;
}

long launch(long kernels = 1) {
  auto& w = world();
  {
    Lock lock(w.lock);
    w.launches += kernels;
  }
  return tick();
}

struct Moment {
  long at = 0;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return Device(DeviceType::CUDA, device_now); }
  Device exchangeDevice(Device to) const override {
    Device from = getDevice();
    device_now = index_of(to);
    return from;
  }
  void setDevice(Device to) const override { device_now = index_of(to); }
  void uncheckedSetDevice(Device to) const noexcept override { device_now = index_of(to); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Stream stream(DeviceIndex device, int64_t id) const {
    return c10::Stream(c10::Stream::UNSAFE, Device(DeviceType::CUDA, device), id);
  }
  c10::Stream getStream(Device on) const override { return stream(index_of(on), stream_now[index_of(on)]); }
  c10::Stream getDefaultStream(Device on) const override { return stream(index_of(on), 0); }
  c10::Stream getNewStream(Device on, int) const override {
    static std::atomic<int64_t> made{0};
    return stream(index_of(on), ++made);
  }
  c10::Stream getStreamFromGlobalPool(Device on, bool) const override { return getNewStream(on, 0); }
  c10::Stream exchangeStream(c10::Stream to) const override {
    c10::Stream from = getStream(to.device());
    stream_now[to.device_index()] = to.id();
    return from;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait_for_device("a stream"); }
  void synchronizeDevice(const DeviceIndex) const override { wait_for_device("a device"); }

  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Moment;
    static_cast<Moment*>(*event)->at = tick();
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Moment*>(event); }
  void block(void*, const c10::Stream&) const override {}
  bool has_come(void* event) const {
    auto& w = world();
    Lock lock(w.lock);
    return event == nullptr || static_cast<Moment*>(event)->at + w.lag <= w.now;
  }
  bool queryEvent(void* event) const override {
    {
      Lock lock(world().lock);
      world().questions++;
    }
    refuse_in_capture("an event is asked");
    if (!has_come(event)) return false;
    if (event != nullptr) deliver(static_cast<Moment*>(event)->at);
    return true;
  }
  void synchronizeEvent(void* event) const override {
    refuse_in_capture("an event is waited for");
    if (!has_come(event)) {
      Lock lock(world().lock);
      world().event_waits++;
    }
    if (event != nullptr) deliver(static_cast<Moment*>(event)->at);
  }
};

// Kernels.

Tensor as_kernels_see(const Tensor& tensor) {
  auto options = tensor.options().device(at::kCPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  auto& w = world();
  char* at = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())) - w.closed + w.open;
  return at::from_blob(at, tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
}

Tensor made_on(DeviceIndex device, c10::IntArrayRef sizes, c10::IntArrayRef strides, at::ScalarType type) {
  On on(device);
  return at::detail::empty_strided_generic(
      sizes, strides, &device_memory(), c10::DispatchKeySet(c10::DispatchKey::CUDA), type);
}

Tensor sent_to(DeviceIndex device, const Tensor& cpu) {
  Tensor tensor = made_on(device, cpu.sizes(), cpu.strides(), cpu.scalar_type());
  if (cpu.numel() > 0) as_kernels_see(tensor).copy_(cpu);
  return tensor;
}

bool ends_in_host_numbers(const std::string& name) {  // whose output's size follows from values
  static const std::set<std::string> names = {
      "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
      "aten::equal", "aten::bincount", "aten::histc", "aten::repeat_interleave.Tensor", "aten::is_nonzero"};
  return names.count(name) > 0;
}

class Call {  // of one operator
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack), name_(op.schema().name()) {
    many_ = name_.rfind("aten::_foreach", 0) == 0 || name_.rfind("aten::_fused", 0) == 0;
    indexes_ = name_.rfind("aten::index", 0) == 0 || name_.rfind("aten::_index", 0) == 0;
  }

  void run() {
    auto& w = world();
    TORCH_CHECK_NOT_IMPLEMENTED(!w.missing.count(name_), "the device has no ", name_);
    size_t count = op_.schema().arguments().size(), first = stack_->size() - count;
    given_.assign(stack_->begin() + first, stack_->end());
    for (size_t i = first; i < stack_->size(); i++) (*stack_)[i] = lowered((*stack_)[i]);
    if (device_ < 0) device_ = device_now;
    if (ends_in_host_numbers(name_) || masks_) wait_for_device(name_);
    launch(kernels());
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    for (auto& [theirs, ours] : seen_)
      if (theirs.sizes() != ours.sizes()) grow(theirs, ours);
    const auto& returns = op_.schema().returns();
    for (size_t i = 0; i < returns.size(); i++) raise(returns[i], (*stack_)[stack_->size() - returns.size() + i]);
  }

 private:
  long kernels() const {  // CUDA takes tensors of unlike shapes one by one
    if (name_.rfind("aten::_foreach", 0) != 0) return 1;
    std::vector<Tensor> first;
    for (const IValue& value : given_) {
      if (!value.isTensorList()) continue;
      std::vector<Tensor> list = value.toTensorVector();
      if (first.empty()) first = list;
      for (size_t i = 0; i < list.size(); i++)
        if (list[i].sizes() != first[i].sizes()) return static_cast<long>(list.size());
    }
    return 1;
  }

  IValue lowered(const IValue& value) {
    if (value.isTensor()) return lowered(value.toTensor());
    if (value.isDevice()) {
      if (device_ < 0 && value.toDevice().is_cuda()) device_ = index_of(value.toDevice());
      return Device(DeviceType::CPU);
    }
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& one : value.toTensorVector()) list.push_back(lowered(one));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& one : value.toOptionalTensorVector()) {
        bool there = one.has_value() && one->defined();
        masks_ |= there && indexes_ && (one->scalar_type() == at::kBool || one->scalar_type() == at::kByte);
        list.push_back(there ? std::optional<Tensor>(lowered(*one)) : std::nullopt);
      }
      return list;
    }
    return value;
  }

  Tensor lowered(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      TORCH_CHECK(
          tensor.dim() == 0 || many_ || indexes_,
          "Expected all tensors to be on the same device, and one of ", name_, " is on the CPU");
      return tensor;
    }
    TORCH_CHECK(
        !world().without_float64 || tensor.scalar_type() != at::kDouble, "the device has no float64, in ", name_);
    if (device_ < 0) device_ = tensor.get_device();
    TORCH_CHECK(
        many_ || device_ == tensor.get_device(), "Expected all tensors to be on the same device, in ", name_,
        " they are on cuda:", int(device_), " and cuda:", int(tensor.get_device()));
    for (auto& [theirs, ours] : seen_)
      if (theirs.is_same(tensor)) return ours;
    seen_.emplace_back(tensor, as_kernels_see(tensor));
    return seen_.back().second;
  }

  static void grow(Tensor& theirs, const Tensor& ours) {
    theirs.resize_(ours.sizes());
    as_kernels_see(theirs).copy_(ours);
  }

  Tensor raised(const Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (auto& [theirs, ours] : seen_)
      if (ours.is_same(tensor)) return theirs;
    TORCH_CHECK(
        !world().without_float64 || tensor.scalar_type() != at::kDouble, "the device has no float64, from ", name_);
    return sent_to(device_, tensor);
  }

  void raise(const c10::Argument& declared, IValue& value) {
    if (value.isTensor()) {
      const auto* alias = declared.alias_info();
      for (size_t i = 0; alias != nullptr && alias->isWrite() && i < given_.size(); i++) {
        const auto* theirs = op_.schema().arguments()[i].alias_info();
        if (theirs != nullptr && *theirs == *alias && given_[i].isTensor()) {  // written in place
          value = given_[i];
          return;
        }
      }
      value = raised(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& one : value.toTensorVector()) list.push_back(raised(one));
      value = list;
    }
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  const std::string& name_;
  std::vector<IValue> given_;
  std::list<std::pair<Tensor, Tensor>> seen_;  // each as the program and as the kernel has it
  int device_ = -1;
  bool many_ = false, indexes_ = false, masks_ = false;
};

void call(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) { Call(op, stack).run(); }

Tensor empty(
    c10::IntArrayRef sizes, std::optional<at::ScalarType> type, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool> pins, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pins.value_or(false), "Only dense CPU tensors can be pinned");
  On on(device.has_value() ? index_of(*device) : device_now);
  auto wanted = type.value_or(c10::get_default_dtype_as_scalartype());
  TORCH_CHECK(!world().without_float64 || wanted != at::kDouble, "the device has no float64, in empty");
  return at::detail::empty_generic(
      sizes, &device_memory(), c10::DispatchKeySet(c10::DispatchKey::CUDA), wanted, format);
}

Tensor empty_strided(
    c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> type, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool> pins) {
  TORCH_CHECK(!pins.value_or(false), "Only dense CPU tensors can be pinned");
  auto wanted = type.value_or(c10::get_default_dtype_as_scalartype());
  TORCH_CHECK(!world().without_float64 || wanted != at::kDouble, "the device has no float64, in empty_strided");
  return made_on(device.has_value() ? index_of(*device) : device_now, sizes, strides, wanted);
}

void to_host(Tensor& to, const Tensor& from, bool asynchronous) {
  if (!asynchronous || !is_pinned(to.const_data_ptr())) {
    wait_for_device("a copy to the host");
    to.copy_(as_kernels_see(from));
    return;
  }
  auto& w = world();
  Tensor content = as_kernels_see(from).to(to.scalar_type(), false, true);
  long sent = launch();
  if (w.lag == 0) {
    to.copy_(content);
    return;
  }
  if (to.is_contiguous()) memset(to.mutable_data_ptr(), 0xFF, to.nbytes());
  Lock lock(w.lock);
  w.letters.push_back({sent, to, content});
}

Tensor& copy_(Tensor& to, const Tensor& from, bool asynchronous) {
  if (to.is_same(from) || to.numel() == 0) return to;
  Tensor source = from.expand_as(to);
  if (!to.is_cuda()) {
    to_host(to, source, asynchronous);
    return to;
  }
  if (!source.is_cuda() && !asynchronous) wait_for_device("a copy from the host");
  launch();
  as_kernels_see(to).copy_(source.is_cuda() ? as_kernels_see(source) : source);
  return to;
}

at::Scalar read(const Tensor& tensor) {
  wait_for_device("a number is read");
  return at::_local_scalar_dense(as_kernels_see(tensor));
}

const Tensor& resize_(const Tensor& tensor, c10::IntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  On on(tensor.get_device());
  return at::native::resize_(tensor, sizes, format);
}

Tensor as_strided(const Tensor& of, c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(of, sizes, strides, offset);
}
Tensor view(const Tensor& of, c10::IntArrayRef sizes) { return at::native::view(of, sizes); }
Tensor reshape_alias(const Tensor& of, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  return at::native::_reshape_alias(of, sizes, strides);
}
Tensor unfold(const Tensor& of, int64_t dim, int64_t size, int64_t step) { return at::native::unfold(of, dim, size, step); }
Tensor view_as_real(const Tensor& of) { return at::native::view_as_real(of); }
Tensor view_as_complex(const Tensor& of) { return at::native::view_as_complex(of); }
Tensor& set_storage(Tensor& of, at::Storage storage, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  return at::native::set_storage_cpu_(of, storage, offset, sizes, strides);
}
void record_stream(Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", read);
  m.impl("resize_", resize_);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("view_as_real", view_as_real);
  m.impl("view_as_complex", view_as_complex);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("record_stream", record_stream);
}

c10::impl::DeviceGuardImplRegistrar guard_registrar(DeviceType::CUDA, new Guard);

}  // namespace

struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return device_now; }
  DeviceIndex getCurrentDevice() const override { return device_now; }
  void setCurrentDevice(DeviceIndex to) const override { device_now = to; }
  DeviceIndex exchangeDevice(DeviceIndex to) const override {
    DeviceIndex from = device_now;
    device_now = to < 0 ? from : to;
    return from;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex to) const override { return exchangeDevice(to); }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_memory(); }
  Device getDeviceFromPtr(void* address) const override {
    auto distance = static_cast<char*>(address) - world().closed;
    return Device(DeviceType::CUDA, static_cast<DeviceIndex>(distance / static_cast<ptrdiff_t>(kRoom)));
  }
  void deviceSynchronize(DeviceIndex) const override { wait_for_device("a device"); }
};
namespace at {
using ::CUDAHooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", CUDAHooks)
}  // namespace at

extern "C" {

int standin_start() {
  c10::SetAllocator(DeviceType::CUDA, &device_memory());
  at::setHostAllocator(DeviceType::CUDA, &pinned_memory());
  auto& dispatcher = c10::Dispatcher::singleton();
  static auto* kept = new std::vector<c10::RegistrationHandleRAII>;
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findOp(name);
    bool together = name.name.rfind("aten::_foreach_", 0) == 0;  // which the CPU takes one by one, unlike CUDA
    bool wanted = name.name.rfind("aten::", 0) == 0 && op.has_value() && op->hasSchema() &&
        (together || op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) &&
        !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA);
    if (wanted)
      kept->push_back(dispatcher.registerImpl(
          name, c10::DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&call>(), std::nullopt, nullptr,
          "stand-in"));
  }
  return at::detail::getCUDAHooks().hasCUDA() ? static_cast<int>(kept->size()) : 0;
}
void standin_lag(long kernels) { world().lag = kernels; }
void standin_waits_raise(int on) { world().raises = on != 0; }
void standin_captures(int on) { world().captures = on != 0; }
void standin_without_float64(int on) { world().without_float64 = on != 0; }
void standin_without(const char* name) { world().missing.insert(std::string("aten::") + name); }
int standin_current() { return device_now; }
void standin_reset() {
  auto& w = world();
  Lock lock(w.lock);
  w.waits = w.event_waits = w.questions = w.launches = 0;
  w.reasons.clear();
  w.peak = w.used[0] + w.used[1];
}
long standin_number(int which) {
  auto& w = world();
  Lock lock(w.lock);
  const long numbers[] = {w.waits, w.event_waits, w.questions, w.peak, w.launches};
  return numbers[which];
}
const char* standin_reasons() {
  static thread_local std::string text;
  auto& w = world();
  Lock lock(w.lock);
  text.clear();
  for (auto& [what, count] : w.reasons) text += what + " (" + std::to_string(count) + " times)\n";
  return text.c_str();
}

}  // extern "C"
