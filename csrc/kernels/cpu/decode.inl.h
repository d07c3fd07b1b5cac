// Attention of new query tokens over keys and values in a cache (contiguous or paged): decode and chunked
// prefill.
//
// Query rows are taken in waves whose scores fit a fixed scratch. In a wave, pass 1 (parallel over blocks of
// rows and ranges of keys, so that one token still fills the machine) scores, packing key panels as it goes;
// pass 2 (parallel over rows) selects and attends. Cost of a decode step: one read of K, and the kept rows of
// V.

template <typename T>
class Decode {
 public:
  using A = acc_t<T>;
  Decode(const CacheParams& p, const Executor& executor)
      : p_(p),
        problem_(p.problem),
        executor_(executor),
        blocks_(make_blocks<A>(p.problem)),
        panels_(executor.workers),
        rows_(executor.workers) {}

  void run() {
    const int64_t count = static_cast<int64_t>(blocks_.list.size());
    for (int64_t first = 0; first < count;) {
      int64_t last = first;
      int64_t scores = 0;
      for (; last < count; ++last) {
        scores += rows(blocks_.list[last]) * stride(blocks_.list[last]);
        if (last > first && scores > kMaxScores) break;
      }
      run_blocks(first, last);
      first = last;
    }
  }

 private:
  static constexpr int64_t kMaxScores = int64_t{1} << 22;  // 16 MiB of float32 scores
  static constexpr int64_t kKeysPerTask = 1024;
  static constexpr int64_t kPanelsAhead = 3;
  static constexpr int64_t kSmall = int64_t{1} << 15;  // query channels copied without threads

  struct Panel {
    Buffer<A> keys;
    explicit Panel(int64_t dim) : keys(kPanel<A> * dim) {}
  };

  int64_t rows(const Block& block) const { return block.tokens * blocks_.group; }
  Span seen(const Block& block, int64_t t) const {
    const Sequence& seq = problem_.sequences[block.sequence];
    return visible(block.token + t, seq.tq, seq.tk, problem_.causal, seq.leftpad);
  }
  int64_t stride(const Block& block) const {
    return panels_of<A>(seen(block, block.tokens - 1).end) * kPanel<A>;
  }

  // Physical row of position j of sequence b.
  int64_t slot(int64_t b, int64_t j) const {
    if (p_.block_table == nullptr) return b * p_.slots_per_entry + j;
    return p_.block_table[b * p_.max_pages + j / p_.page_size] * p_.page_size + j % p_.page_size;
  }
  const T* row(const View& view, int64_t b, int64_t j, int64_t head) const {
    if (p_.block_table == nullptr) return at<T>(view, b, j, head);
    return at<T>(view, p_.block_table[b * p_.max_pages + j / p_.page_size], j % p_.page_size, head);
  }

  void run_blocks(int64_t first, int64_t last) {
    // Where each block's query rows and scores lie in the wave's scratch.
    Buffer<int64_t> q_offsets(last - first + 1);
    Buffer<int64_t> offsets(last - first + 1);
    q_offsets[0] = offsets[0] = 0;
    // Blocks of one (sequence, KV head) share each packed panel.
    struct Task {
      int64_t first, last;
      int64_t panel, panels;
    };
    std::vector<Task> score_tasks;
    struct Row {
      int64_t block, t, g;
    };
    std::vector<Row> row_tasks;
    for (int64_t b = first; b < last; ++b) {
      const Block& block = blocks_.list[b];
      q_offsets[b - first + 1] = q_offsets[b - first] + rows(block) * problem_.head_dim;
      offsets[b - first + 1] = offsets[b - first] + rows(block) * stride(block);
      for (int64_t t = 0; t < block.tokens; ++t) {
        for (int64_t g = 0; g < (problem_.kv_group ? 1 : blocks_.group); ++g) row_tasks.push_back({b, t, g});
      }
    }
    for (int64_t b = first; b < last;) {
      int64_t end = b;
      while (end < last && blocks_.list[end].sequence == blocks_.list[b].sequence &&
             blocks_.list[end].kv_head == blocks_.list[b].kv_head) {
        ++end;
      }
      const Span most = seen(blocks_.list[end - 1], blocks_.list[end - 1].tokens - 1);
      const int64_t panels = panels_of<A>(most.end);
      const int64_t step = kKeysPerTask / kPanel<A>;
      for (int64_t i = most.size() > 0 ? most.begin / kPanel<A> : panels; i < panels; i += step) {
        score_tasks.push_back({b, end, i, std::min(step, panels - i)});
      }
      b = end;
    }
    Buffer<A> q(q_offsets[last - first]);
    Buffer<A> scores(offsets[last - first]);

    auto load_queries = [&](int64_t index, int64_t) {
      const Block& block = blocks_.list[first + index];
      load_rows<T>(p_.q, problem_.sequences[block.sequence], block, blocks_.group, problem_.head_dim,
                   q.data() + q_offsets[index]);
    };
    if (q_offsets[last - first] < kSmall) {  // waking the threads would take longer
      for (int64_t b = first; b < last; ++b) load_queries(b - first, 0);
    } else {
      parallel(executor_, last - first, load_queries);
    }

    auto score = [&](int64_t index, int64_t worker) {
      const Task& task = score_tasks[index];
      const int64_t kv_head = blocks_.list[task.first].kv_head;
      const Sequence& seq = problem_.sequences[blocks_.list[task.first].sequence];
      Panel& panel = panels_.get(worker, problem_.head_dim);
      for (int64_t i = task.panel; i < task.panel + task.panels; ++i) {
        const int64_t key = i * kPanel<A>;
        if (i + kPanelsAhead < task.panel + task.panels)
          prefetch(seq, kv_head, key + kPanelsAhead * kPanel<A>);
        // Rows past the valid keys are not read: they may be anything.
        const int n = static_cast<int>(std::min<int64_t>(kPanel<A>, seq.tk - key));
        pack_panel<T>([&](int r) { return row(p_.k, seq.batch, key + r, kv_head); }, n, problem_.head_dim,
                      panel.keys.data());
        for (int64_t b = task.first; b < task.last; ++b) {
          const Block& block = blocks_.list[b];
          if (stride(block) <= key) continue;  // none of its rows sees this panel
          score_panel<A>(rows(block), q.data() + q_offsets[b - first], problem_.head_dim, panel.keys.data(),
                         scores.data() + offsets[b - first] + key, stride(block));
        }
      }
    };
    parallel(executor_, static_cast<int64_t>(score_tasks.size()), score);

    auto attend = [&](int64_t index, int64_t worker) {
      const Row& task = row_tasks[index];
      finish(blocks_.list[task.block], task.t, task.g, scores.data() + offsets[task.block - first], worker);
    };
    parallel(executor_, static_cast<int64_t>(row_tasks.size()), attend);
  }

  // Asks for the cache lines of one panel's key rows: their stride defeats the hardware's own guess.
  void prefetch(const Sequence& seq, int64_t kv_head, int64_t key) const {
    const int64_t bytes = problem_.head_dim * static_cast<int64_t>(sizeof(T));
    for (int64_t r = 0; r < kPanel<A> && key + r < seq.tk; ++r) {
      const char* line = reinterpret_cast<const char*>(row(p_.k, seq.batch, key + r, kv_head));
      for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(line + c);
    }
  }

  // Selects and attends row (t, g) of a block; with one set per KV group, all rows of token t.
  void finish(const Block& block, int64_t t, int64_t g, const A* block_scores, int64_t worker) {
    const Sequence& seq = problem_.sequences[block.sequence];
    RowScratch<A>& scratch = rows_.get(worker, blocks_.max_keys, std::max(problem_.head_dim, problem_.v_dim));
    const RowPlan plan = plan_row(seen(block, t), problem_.budget, problem_.sink, problem_.recent);
    const int64_t score_stride = stride(block);
    const A* scores = block_scores + (t * blocks_.group) * score_stride;
    int64_t last_head = g + 1;
    Encoding<A> encoding;
    if (problem_.kv_group) {
      last_head = blocks_.group;
      group_maximum(scores, score_stride, blocks_.group, plan.seen, scratch.group.data());
      encoding = keep_row(scratch.group.data(), plan, scratch);
    } else {
      encoding = keep_row(scores + g * score_stride, plan, scratch);
    }
    const auto v_row = [&](int32_t j) { return row(p_.v, seq.batch, j, block.kv_head); };
    for (int64_t h = g; h < last_head; ++h) {
      const int64_t head = block.kv_head * blocks_.group + h;
      const int64_t out_row = problem_.rows.at(seq.batch, head, block.token + t);
      static_cast<A*>(p_.threshold)[out_row] = encoding.threshold;
      p_.tie_index[out_row] = encoding.tie_index;
      static_cast<A*>(p_.lse)[out_row] =
          attend_row<T>(scores + h * score_stride, plan.kept, static_cast<A>(problem_.softmax_scale), v_row,
                        problem_.v_dim, scratch, at_mutable<T>(p_.out, seq.batch, block.token + t, head));
      if (p_.indices == nullptr) continue;
      int32_t* indices = p_.indices + out_row * p_.kept_width;
      int32_t* slots = p_.slots + out_row * p_.kept_width;
      for (int64_t i = 0; i < p_.kept_width; ++i) {
        indices[i] = i < plan.kept ? scratch.kept[i] : -1;
        slots[i] = i < plan.kept ? static_cast<int32_t>(slot(seq.batch, scratch.kept[i])) : -1;
      }
    }
  }

  const CacheParams& p_;
  const Problem& problem_;
  const Executor& executor_;
  Blocks blocks_;
  PerWorker<Panel> panels_;
  PerWorker<RowScratch<A>> rows_;
};

template <typename T>
void forward_kvcache(const CacheParams& p, const Executor& executor) {
  Decode<T>(p, executor).run();
}

// Selection over given score rows.
template <typename T>
void select_scores(const SelectScoresParams& p, const Executor& executor) {
  PerWorker<RowScratch<float>> workers(executor.workers);
  auto body = [&](int64_t row, int64_t worker) {
    RowScratch<float>& scratch = workers.get(worker, p.n, 1);
    const int64_t n = p.lengths != nullptr ? p.lengths[row] : p.n;
    const T* source = static_cast<const T*>(p.scores) + row * p.row_stride;
    for (int64_t j = 0; j < n; ++j) scratch.group[j] = to_acc(source[j]);
    const int64_t w = std::min(p.topk, n);
    const Encoding<float> encoding =
        select_row(scratch.group.data(), n, w, 0, scratch.select, scratch.kept.data());
    p.threshold[row] = encoding.threshold;
    p.tie_index[row] = encoding.tie_index;
    for (int64_t i = 0; i < p.topk; ++i) p.indices[row * p.topk + i] = i < w ? scratch.kept[i] : -1;
  };
  parallel(executor, p.rows, body);
}
