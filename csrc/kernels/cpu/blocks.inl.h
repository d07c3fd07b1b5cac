// Work decomposition of training: blocks of query tokens of one (sequence, KV head), and the packed keys they
// score against. Blocks depend on the problem only, never on the number of threads.

// Tokens [token, token + tokens) of one KV group; its rows are token-major, then heads of the group.
struct Block {
  int64_t sequence;
  int64_t kv_head;
  int64_t token;
  int64_t tokens;
};

struct Blocks {
  std::vector<Block> list;
  int64_t group = 1;     // query heads per KV head
  int64_t max_rows = 1;  // most rows of a block
  int64_t max_keys = 1;  // most keys of a sequence, rounded up to whole panels
};

// Blocks of about 24 rows: enough to reuse a packed panel from the first-level cache, few enough for the
// block's scores to stay near the core.
template <typename A>
Blocks make_blocks(const Problem& p) {
  Blocks blocks;
  blocks.group = p.kv_heads > 0 ? p.heads / p.kv_heads : 1;
  const int64_t rows = kTileRows * (24 / kTileRows);
  const int64_t tokens = std::max<int64_t>(1, rows / blocks.group);
  for (int64_t s = 0; s < p.num_sequences; ++s) {
    const Sequence& seq = p.sequences[s];
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      for (int64_t t = 0; t < seq.tq; t += tokens) {
        blocks.list.push_back({s, h, t, std::min(tokens, seq.tq - t)});
      }
    }
    blocks.max_keys = std::max(blocks.max_keys, panels_of<A>(seq.tk) * kPanel<A>);
  }
  blocks.max_rows = tokens * blocks.group;
  return blocks;
}

// Blocks [first, last) of one (sequence, KV head) whose rows walk the keys together, range by range, so that
// the rows of K and V in a range stay in the second-level cache while every row of the group visits them. A
// row's sums run over its keys in ascending order whatever the groups and ranges, so neither changes a bit.
struct Group {
  int64_t first;
  int64_t last;
};
inline constexpr int64_t kGroupRows = 384;

// Keys of a range: about 16 kept keys a row (finding a row's part costs as much as a few of them), within the
// cache.
inline int64_t range_of(int64_t keys, int64_t kept, int64_t row_bytes) {
  constexpr int64_t kRangeBytes = int64_t{1} << 18;
  const int64_t wanted = 16 * keys / std::max<int64_t>(1, kept);
  const int64_t room = std::max<int64_t>(128, kRangeBytes / row_bytes);
  // So few kept keys that rows of a group would share hardly any: what matters is to walk few ranges.
  if (kGroupRows * kept < keys) return std::clamp<int64_t>(wanted, room, 8 * room);
  return std::clamp<int64_t>(wanted, 128, room);
}

template <typename T>
const T* at(const View& view, int64_t batch, int64_t token, int64_t head) {
  return static_cast<const T*>(view.data) + batch * view.batch + token * view.token + head * view.head;
}
template <typename T>
T* at_mutable(const View& view, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(view.data) + batch * view.batch + token * view.token + head * view.head;
}

// The rows of one head from `data` on, by position. By value in every loop: nothing that is stored can change
// it.
template <typename T>
struct HeadRows {
  const T* data;
  int64_t stride;
  const T* operator()(int32_t j) const { return data + j * stride; }
};
template <typename T>
HeadRows<T> key_rows(const View& view, const Sequence& seq, int64_t kv_head) {
  return {at<T>(view, seq.batch, seq.k_begin, kv_head), view.token};
}

// Room for n elements; what the buffer held is lost when it grows.
template <typename E>
void reserve(Buffer<E>& buffer, int64_t n) {
  if (buffer.size() < n) buffer = Buffer<E>(n);
}

// Runs body(task, worker) on the executor.
template <typename Body>
void parallel(const Executor& executor, int64_t tasks, Body& body) {
  executor.run(
      executor, tasks,
      [](void* context, int64_t task, int64_t worker) { (*static_cast<Body*>(context))(task, worker); },
      &body);
}

// One scratch object per worker, made when the worker first needs it.
template <typename S>
class PerWorker {
 public:
  explicit PerWorker(int64_t workers) : slots_(workers) {}
  template <typename... Args>
  S& get(int64_t worker, Args&&... args) {
    if (!slots_[worker]) slots_[worker] = std::make_unique<S>(std::forward<Args>(args)...);
    return *slots_[worker];
  }

 private:
  std::vector<std::unique_ptr<S>> slots_;
};

// All keys of a problem, packed into panels: (sequence, KV head, panel, head_dim, kPanel).
template <typename T>
class PackedKeys {
 public:
  using A = acc_t<T>;
  PackedKeys(const Problem& p, const View& k, const Executor& executor)
      : dim_(p.head_dim), first_(p.num_sequences) {
    int64_t panels = 0;
    for (int64_t s = 0; s < p.num_sequences; ++s) {
      first_[s] = panels;
      panels += panels_of<A>(p.sequences[s].tk) * p.kv_heads;
    }
    data_ = Buffer<A>(panels * kPanel<A> * dim_);
    // A task packs up to 64 panels of one (sequence, KV head).
    struct Task {
      int64_t sequence, kv_head, panel;
    };
    std::vector<Task> tasks;
    for (int64_t s = 0; s < p.num_sequences; ++s) {
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        for (int64_t b = 0; b < panels_of<A>(p.sequences[s].tk); b += 64) tasks.push_back({s, h, b});
      }
    }
    auto body = [&](int64_t index, int64_t) {
      const Task& task = tasks[index];
      const Sequence& seq = p.sequences[task.sequence];
      const int64_t panels_here = panels_of<A>(seq.tk);
      for (int64_t b = task.panel; b < std::min(task.panel + 64, panels_here); ++b) {
        const int64_t key = b * kPanel<A>;
        const int count = static_cast<int>(std::min<int64_t>(kPanel<A>, seq.tk - key));
        pack_panel<T>([&](int i) { return at<T>(k, seq.batch, seq.k_begin + key + i, task.kv_head); }, count,
                      dim_, panel(task.sequence, panels_here, task.kv_head, b));
      }
    };
    parallel(executor, static_cast<int64_t>(tasks.size()), body);
  }
  A* panel(int64_t sequence, int64_t panels, int64_t kv_head, int64_t index) const {
    return const_cast<A*>(data_.data()) + (first_[sequence] + kv_head * panels + index) * kPanel<A> * dim_;
  }

 private:
  int64_t dim_;
  Buffer<int64_t> first_;
  Buffer<A> data_;
};

// Query rows of a block in A, and their raw scores.
template <typename A>
struct BlockScratch {
  Buffer<A> q;
  Buffer<A> scores;
  int64_t stride;  // of a row of scores; one panel more than needed, lest a power of two puts all rows in one
                   // cache set
  RowScratch<A> row;
  BlockScratch(const Blocks& blocks, int64_t dim, int64_t v_dim)
      : q(blocks.max_rows * dim),
        scores(blocks.max_rows * (blocks.max_keys + kPanel<A>)),
        stride(blocks.max_keys + kPanel<A>),
        row(blocks.max_keys, std::max(dim, v_dim)) {}
};

// Copies the block's query rows to `q` (A, token-major then head).
template <typename T>
void load_rows(const View& view, const Sequence& seq, const Block& block, int64_t group, int64_t dim,
               acc_t<T>* q) {
  for (int64_t t = 0; t < block.tokens; ++t) {
    for (int64_t g = 0; g < group; ++g) {
      const T* row = at<T>(view, seq.batch, seq.q_begin + block.token + t, block.kv_head * group + g);
      for (int64_t c = 0; c < dim; ++c) *q++ = to_acc(row[c]);
    }
  }
}

// Raw scores of the block's rows against every key its last row sees.
template <typename T>
void score_block(const Problem& p, const View& q, const PackedKeys<T>& keys, const Blocks& blocks,
                 const Block& block, BlockScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const Sequence& seq = p.sequences[block.sequence];
  load_rows<T>(q, seq, block, blocks.group, p.head_dim, scratch.q.data());
  const Span seen = visible(block.token + block.tokens - 1, seq.tq, seq.tk, p.causal, seq.leftpad);
  const int64_t panels = panels_of<A>(seq.tk);
  for (int64_t b = 0; b < panels_of<A>(seen.end); ++b) {
    score_panel<A>(block.tokens * blocks.group, scratch.q.data(), p.head_dim,
                   keys.panel(block.sequence, panels, block.kv_head, b),
                   scratch.scores.data() + b * kPanel<A>, scratch.stride);
  }
}
