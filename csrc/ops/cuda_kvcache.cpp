// CUDA implementation of fwd_kvcache: checks, allocation, kernels. Nothing here waits for the device:
// lengths, paddings and page numbers are checked by the kernels (contract section 9).

#include <ATen/MemoryOverlap.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common.h"
#include "cuda/decode/params.h"

namespace topk_attn {
namespace {

using cuda::decode::DecodeCall;

void check(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, "topk_attn: ", what, " failed: ", cudaGetErrorString(error));
}

int32_t narrow(int64_t value, const char* what) {
  TORCH_CHECK(value <= std::numeric_limits<int32_t>::max(), "topk_attn: ", what, " must be below 2^31, got ",
              value);
  return static_cast<int32_t>(value);
}

// Rows written for one sequence must not appear in another.
void check_writable(const Tensor& cache, const char* name) {
  TORCH_CHECK(at::has_internal_overlap(cache) != at::MemOverlap::Yes, "topk_attn: ", name,
              " must not be an expanded tensor when new rows are written, got strides ", cache.strides(),
              " for sizes ", cache.sizes(), ": several of its elements share memory");
}

// The kernels read rows 16 bytes at a time.
bool is_aligned(const Tensor& t) {
  const int64_t unit = 16 / t.element_size();
  bool good = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) good = good && (t.size(d) <= 1 || t.stride(d) % unit == 0);
  return good;
}

// Strides of dimensions of size 1 mean nothing, and may be anything: none is used.
View cache_view(const Tensor& t) {
  View v = view_of(t);
  if (t.size(0) <= 1) v.batch = 0;
  if (t.size(1) <= 1) v.token = 0;
  if (t.size(2) <= 1) v.head = 0;
  return v;
}

Tensor aligned(const Tensor& t) {
  return is_aligned(t) ? t : t.clone(at::MemoryFormat::Contiguous);
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
  TORCH_CHECK(q.scalar_type() != at::kDouble,
              "topk_attn: q must be float32, bfloat16 or float16 on CUDA, got Double (float64 runs on the "
              "CPU)");
  TORCH_CHECK(!key_codes.has_value(),
              "topk_attn: key_codes must be None: this version has no certified scan, the exact one needs no "
              "codes");
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  TORCH_CHECK(device->major >= 8, "topk_attn: the GPU must have compute capability 8.0 or higher, ",
              device->name, " has ", device->major, ".", device->minor);
  const int sms = device->multiProcessorCount;
  cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  const int64_t appended = cache.appended.expect_int();

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
  c.softmax_scale = static_cast<float>(check_scale(softmax_scale, cache.head_dim));
  c.capacity = narrow(cache.capacity.expect_int(), "the cache's room");
  c.kept_width = budget(c.capacity, settings.budget);
  c.rows = RowLayout{cache.heads * c.tq, c.tq};
  TORCH_CHECK(cuda::decode::supports(c), "topk_attn: this build of the library has no kernels for ",
              q.scalar_type(), " with head dim ", c.head_dim, " (TOPK_CUDA_DTYPES, TOPK_CUDA_HEAD_DIMS)");

  const Tensor seqlens = cache_seqlens.contiguous();
  const Tensor leftpad = cache_leftpad.has_value() ? cache_leftpad->contiguous() : Tensor();
  const Tensor table = block_table.has_value() ? block_table->contiguous() : Tensor();
  c.cache_seqlens = seqlens.data_ptr<int32_t>();
  if (leftpad.defined()) c.cache_leftpad = leftpad.data_ptr<int32_t>();
  if (table.defined()) {
    c.block_table = table.data_ptr<int32_t>();
    c.max_pages = narrow(table.size(1), "block_table's width");
    c.page_size = narrow(k_cache.size(1), "the page size");
    c.pages = narrow(k_cache.size(0), "the number of pages");
  }
  c.slots_per_entry = k_cache.size(1);
  c.k = cache_view(k_cache);
  c.v = cache_view(v_cache);
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
  if (appended > 0) {  // the caches are written outside torch's sight: let autograd's version check know
    for (const Tensor& written : {k_cache, v_cache}) {
      if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
    }
  }
  // A cache whose rows are not 16-byte aligned is copied: correct, and slow.
  const Tensor keys = aligned(k_cache);
  const Tensor values = aligned(v_cache);
  c.k = cache_view(keys);
  c.v = cache_view(values);
  check(cuda::decode::run(c, scratch, sms, stream), "the decode kernels");
  return {out, lse, indices, slots, threshold, tie_index};
}

}  // namespace
}  // namespace topk_attn

TORCH_LIBRARY_IMPL(topk_attn, CUDA, m) {
  m.impl("fwd_kvcache", &topk_attn::fwd_kvcache);
}
