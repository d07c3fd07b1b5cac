// CUDA implementation of fwd_kvcache and of the key codes of a cache: checks, allocation, plan, kernels.
// Nothing here waits for the device: lengths, paddings and page numbers are checked by the kernels (contract
// section 9).

#include <ATen/MemoryOverlap.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <mutex>

#include "cuda/decode/certified.h"
#include "cuda/decode/plan.h"
#include "cuda_common.h"

namespace topk_attn {
namespace {

using cuda::decode::DecodeCall;

// What topk_attn.cuda.override() set, process-wide.
struct Shared {
  std::mutex mutex;
  cuda::decode::DecodeWish wish;
};
Shared& shared() {
  static Shared instance;
  return instance;
}

// Rows written for one sequence must not appear in another.
void check_writable(const Tensor& cache, const char* name) {
  TORCH_CHECK(at::has_internal_overlap(cache) != at::MemOverlap::Yes, "topk_attn: ", name,
              " must not be an expanded tensor when new rows are written, got strides ", cache.strides(),
              " for sizes ", cache.sizes(), ": several of its elements share memory");
}

// Strides of dimensions of size 1 mean nothing, and may be anything: none is used.
View cache_view(const Tensor& t) {
  View v = view_of(t);
  if (t.size(0) <= 1) v.batch = 0;
  if (t.size(1) <= 1) v.token = 0;
  if (t.size(2) <= 1) v.head = 0;
  return v;
}

// A tensor is written outside torch's sight: let autograd's version check know.
void note_write(const Tensor& written) {
  if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
}

// Compute capability, 10 * major + minor.
int capability() {
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  TORCH_CHECK(device->major >= 8, "topk_attn: the GPU must have compute capability 8.0 or higher, ",
              device->name, " has ", device->major, ".", device->minor);
  return device->major * 10 + device->minor;
}

// Sizes and settings of a call.
DecodeCall call_of(const Tensor& q, const CacheShape& cache, const Settings& settings, bool causal) {
  TORCH_CHECK(q.scalar_type() != at::kDouble,
              "topk_attn: q must be float32, bfloat16 or float16 on CUDA, got Double (float64 runs on the "
              "CPU)");
  DecodeCall c;
  c.dtype = dtype_of(q);
  c.heads = narrow(cache.heads, "the number of heads");
  c.kv_heads = narrow(cache.kv_heads, "the number of KV heads");
  c.head_dim = static_cast<int32_t>(cache.head_dim);
  c.v_dim = static_cast<int32_t>(cache.v_dim);
  c.batch = narrow(cache.batch.expect_int(), "the batch size");
  c.tq = narrow(cache.tq.expect_int(), "the number of queries");
  c.causal = causal;
  c.kv_group = settings.kv_group && cache.heads > cache.kv_heads;
  c.budget = settings.budget;
  c.sink = settings.sink;
  c.recent = settings.recent;
  c.capacity = narrow(cache.capacity.expect_int(), "the cache's room");
  c.kept_width = budget(c.capacity, settings.budget);
  c.rows = RowLayout{cache.heads * c.tq, c.tq};
  TORCH_CHECK(cuda::decode::supports(c), "topk_attn: this build of the library has no kernels for ",
              q.scalar_type(), " with head dim ", c.head_dim, " (TOPK_CUDA_DTYPES, TOPK_CUDA_HEAD_DIMS)");
  return c;
}

// Where the keys of a sequence lie. The tensors must outlive the call.
void set_places(DecodeCall& c, const Tensor& k_cache, const Tensor& seqlens, const Tensor& leftpad,
                const Tensor& table) {
  c.cache_seqlens = seqlens.data_ptr<int32_t>();
  if (leftpad.defined()) c.cache_leftpad = leftpad.data_ptr<int32_t>();
  if (table.defined()) {
    c.block_table = table.data_ptr<int32_t>();
    c.max_pages = narrow(table.size(1), "block_table's width");
    c.page_size = narrow(k_cache.size(1), "the page size");
    c.pages = narrow(k_cache.size(0), "the number of pages");
  }
  c.slots_per_entry = k_cache.size(1);
}

Tensor packed(const OptTensor& t) {
  return t.has_value() ? t->contiguous() : Tensor();
}

// The parts of a checked buffer.
cuda::decode::KeyCodes parts_of(const Tensor& key_codes, const Tensor& k_cache) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(key_codes.data_ptr()) % 16 == 0,
              "topk_attn: key_codes must start at a multiple of 16 bytes, as key_codes_new makes it, got a "
              "view that does not");
  return cuda::decode::codes_of(key_codes.data_ptr(), k_cache.size(0), k_cache.size(1),
                                narrow(k_cache.size(2), "the number of KV heads"),
                                static_cast<int32_t>(k_cache.size(3)));
}

cuda::decode::DecodePlan plan_of(const DecodeCall& c, bool codes, const cuda::decode::DecodeWish& wish) {
  const cuda::decode::DecodePlan plan = cuda::decode::plan(c, codes, capability(), wish);
  TORCH_CHECK(plan.problem.empty(), "topk_attn: ", plan.problem);
  return plan;
}

cuda::decode::DecodeWish current_wish() {
  const std::lock_guard<std::mutex> lock(shared().mutex);
  return shared().wish;
}

FwdResult fwd_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k,
                      const OptTensor& v, const Tensor& cache_seqlens, const OptTensor& cache_leftpad,
                      const OptTensor& block_table, const OptTensor& key_codes, bool causal, OptInt topk,
                      std::optional<double> ratio, int64_t min_keys, OptInt max_keys, std::string_view select,
                      int64_t sink, int64_t recent, std::optional<double> softmax_scale,
                      bool return_indices) {
  const Settings settings =
      check_settings(symbolic(topk), ratio, min_keys, symbolic(max_keys), select, sink, recent);
  TORCH_CHECK(q.is_cuda(), "topk_attn: q is on ", q.device(), ", but k_cache is on ", k_cache.device(),
              ": they must be on one device");
  const c10::cuda::CUDAGuard guard(q.device());
  const CacheShape cache = check_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, cache_leftpad, block_table,
                                         key_codes, return_indices);
  DecodeCall c = call_of(q, cache, settings, causal);
  c.softmax_scale = static_cast<float>(check_scale(softmax_scale, cache.head_dim));
  const cuda::decode::DecodeWish wish = current_wish();
  const bool by_codes = plan_of(c, key_codes.has_value(), wish).scan == cuda::decode::Scan::kCertified;
  const int sms = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const int64_t appended = cache.appended.expect_int();

  const Tensor seqlens = cache_seqlens.contiguous();
  const Tensor leftpad = packed(cache_leftpad);
  const Tensor table = packed(block_table);
  set_places(c, k_cache, seqlens, leftpad, table);
  c.k = cache_view(k_cache);
  c.v = cache_view(v_cache);
  cuda::decode::CertifiedRun certified;
  if (key_codes.has_value()) certified.codes = parts_of(*key_codes, k_cache);
  if (appended > 0) {
    check_writable(k_cache, "k_cache");
    check_writable(v_cache, "v_cache");
    TORCH_CHECK(at::get_overlap_status(k_cache, v_cache) == at::MemOverlapStatus::No ||
                    at::get_overlap_status(k_cache, v_cache) == at::MemOverlapStatus::TooHard,
                "topk_attn: k_cache and v_cache must not share memory when new rows are written");
    c.appended = narrow(appended, "the number of new rows");
    c.new_k = view_of(*k);
    c.new_v = view_of(*v);
  }

  const auto floats = q.options().dtype(at::kFloat);
  const auto ints = q.options().dtype(at::kInt);
  const Tensor out = at::empty({c.batch, c.tq, c.heads, c.v_dim}, q.options());
  const Tensor lse = at::empty({c.batch, c.heads, c.tq}, floats);
  const Tensor threshold = at::empty({c.batch, c.heads, c.tq}, floats);
  const Tensor tie_index = at::empty({c.batch, c.heads, c.tq}, ints);
  Tensor indices = at::empty({0}, ints);
  Tensor slots = at::empty({0}, ints);
  if (return_indices) {
    indices = at::empty({c.batch, c.heads, c.tq, c.kept_width}, ints);
    slots = at::empty({c.batch, c.heads, c.tq, c.kept_width}, ints);
    c.indices = indices.data_ptr<int32_t>();
    c.slots = slots.data_ptr<int32_t>();
  }
  const Tensor q_rows = aligned(q);
  c.q = view_of(q_rows);
  c.out = view_of(out);
  c.lse = lse.data_ptr<float>();
  c.threshold = threshold.data_ptr<float>();
  c.tie_index = tie_index.data_ptr<int32_t>();

  const size_t bytes = cuda::decode::workspace_bytes(c, sms);
  const Tensor workspace = at::empty({static_cast<int64_t>(bytes)}, q.options().dtype(at::kByte));
  const cuda::decode::Scratch scratch = cuda::decode::scratch_of(c, workspace.data_ptr(), sms);
  check(cuda::decode::prepare(c, scratch, stream), "the append");
  if (appended > 0) {
    note_write(k_cache);
    note_write(v_cache);
  }
  // A cache whose rows are not 16-byte aligned is copied: correct, and slow.
  const Tensor keys = aligned(k_cache);
  const Tensor values = aligned(v_cache);
  c.k = cache_view(keys);
  c.v = cache_view(values);

  if (key_codes.has_value()) {
    // Whichever scan serves the call: codes never fall behind.
    check(cuda::decode::encode(c, scratch, certified.codes, false, stream), "the encoding of new keys");
    note_write(*key_codes);
  }
  Tensor certified_workspace;
  if (by_codes) {
    const cuda::decode::Slab slab = cuda::decode::largest_slab(c);
    certified_workspace = at::empty({static_cast<int64_t>(cuda::decode::certified_bytes(c, slab, sms))},
                                    q.options().dtype(at::kByte));
    certified.scratch = cuda::decode::certified_scratch(c, slab, certified_workspace.data_ptr(), sms);
    if (wish.list_room > 0) certified.scratch.room = std::min(certified.scratch.room, wish.list_room);
  }
  check(cuda::decode::run(c, scratch, sms, stream, by_codes ? &certified : nullptr), "the decode kernels");
  return {out, lse, indices, slots, threshold, tie_index};
}

// ---------------------------------------------------------------------------------------------------------------
// Key codes
// ---------------------------------------------------------------------------------------------------------------

Tensor key_codes_new(const Tensor& k_cache) {
  const SymInt bytes = check_codes_cache(k_cache);
  return at::zeros({bytes.expect_int()}, k_cache.options().dtype(at::kChar));
}

void key_codes_rebuild(const Tensor& key_codes, const Tensor& k_cache, const Tensor& cache_seqlens,
                       const OptTensor& cache_leftpad, const OptTensor& block_table, bool calibrate) {
  check_rebuild(key_codes, k_cache, cache_seqlens, cache_leftpad, block_table);
  const c10::cuda::CUDAGuard guard(k_cache.device());
  capability();
  cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const Tensor seqlens = cache_seqlens.contiguous();
  const Tensor leftpad = packed(cache_leftpad);
  const Tensor table = packed(block_table);
  DecodeCall c;
  c.dtype = dtype_of(k_cache);
  c.heads = c.kv_heads = narrow(k_cache.size(2), "the number of KV heads");
  c.head_dim = c.v_dim = static_cast<int32_t>(k_cache.size(3));
  c.batch = narrow(seqlens.size(0), "the batch size");
  c.capacity =
      narrow(table.defined() ? table.size(1) * k_cache.size(1) : k_cache.size(1), "the cache's room");
  set_places(c, k_cache, seqlens, leftpad, table);
  c.k = c.v = cache_view(k_cache);
  const cuda::decode::KeyCodes codes = parts_of(key_codes, k_cache);
  Tensor states;
  cuda::decode::Scratch scratch;
  if (table.defined()) {
    states = at::empty({c.batch, 2}, seqlens.options());
    scratch.state = reinterpret_cast<cuda::decode::State*>(states.data_ptr<int32_t>());
  }
  check(cuda::decode::prepare(c, scratch, stream), "the check of the pages");
  if (calibrate) {
    check(cuda::decode::calibrate(c, scratch, codes, k_cache.size(0), stream),
          "the calibration of key codes");
  }
  check(cuda::decode::encode(c, scratch, codes, true, stream), "the encoding of keys");
  note_write(key_codes);
}

// ---------------------------------------------------------------------------------------------------------------
// Plans, for topk_attn.cuda
// ---------------------------------------------------------------------------------------------------------------

std::tuple<std::string, std::string> decode_plan(const Tensor& q, const Tensor& k_cache,
                                                 const Tensor& v_cache, const OptTensor& block_table,
                                                 const OptTensor& key_codes, bool causal, OptInt topk,
                                                 std::optional<double> ratio, int64_t min_keys,
                                                 OptInt max_keys, std::string_view select, int64_t sink,
                                                 int64_t recent) {
  const Settings settings =
      check_settings(symbolic(topk), ratio, min_keys, symbolic(max_keys), select, sink, recent);
  TORCH_CHECK(q.is_cuda(), "topk_attn: q must be on CUDA to plan for a GPU, got ", q.device());
  const c10::cuda::CUDAGuard guard(q.device());
  const CacheShape cache = check_kvcache(q, k_cache, v_cache, std::nullopt, std::nullopt, std::nullopt,
                                         std::nullopt, block_table, key_codes, false);
  const auto plan = plan_of(call_of(q, cache, settings, causal), key_codes.has_value(), current_wish());
  return {cuda::decode::name_of(plan.scan), plan.reason};
}

void set_decode_wish(std::string_view scan, int64_t list_room) {
  const std::lock_guard<std::mutex> lock(shared().mutex);
  shared().wish = {std::string(scan), narrow(list_room, "list_room")};
}

}  // namespace
}  // namespace topk_attn

TORCH_LIBRARY_IMPL(topk_attn, CUDA, m) {
  m.impl("fwd_kvcache", &topk_attn::fwd_kvcache);
  m.impl("key_codes_new", &topk_attn::key_codes_new);
  m.impl("key_codes_rebuild", &topk_attn::key_codes_rebuild);
}

TORCH_LIBRARY_FRAGMENT(topk_attn, m) {
  m.def(
      "_cuda_decode_plan(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? block_table=None, Tensor? "
      "key_codes=None, *, bool causal=True, int? topk=None, float? ratio=None, int min_keys=1, int? "
      "max_keys=None, str select='head', int sink=0, int recent=0) -> (str, str)",
      &topk_attn::decode_plan);
  m.def("_cuda_override_decode(str scan, int list_room) -> ()", &topk_attn::set_decode_wish);
}
