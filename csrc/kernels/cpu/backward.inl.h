// Training backward: dQ, dK, dV over the kept pairs only; the selection is a constant.
//
// With p the probability of a kept pair and dp = dO . v: ds = p * (dp - sum(p * dp) + dlse) * scale, dq += ds
// * k, dk += ds * q, dv += p * dO. Rows are taken in runs of blocks whose kept pairs fit a fixed scratch. In
// a run, pass 1 (parallel over blocks) makes ds and dq; pass 2 (parallel over ranges of keys) adds to dk and
// dv in ascending row order, so every sum has one order whatever the number of threads: always deterministic.
// The kept lists come from the forward, or are made again from the encoding with the same scores.

// Kept pairs of one block: row r of it (token-major, then head) holds count(r) entries at r * width.
template <typename A>
struct BlockPairs {
  int64_t width = 0;
  Buffer<int32_t> index;  // empty: the forward's own lists are read
  Buffer<A> prob;
  Buffer<A> ds;
};

template <typename T>
class Backward {
 public:
  using A = acc_t<T>;
  Backward(const BackwardParams& p, const Executor& executor)
      : p_(p),
        problem_(p.problem),
        executor_(executor),
        blocks_(make_blocks<A>(p.problem)),
        saved_(p.kept_width > 0),
        workers_(executor.workers) {
    if (!saved_) keys_ = std::make_unique<PackedKeys<T>>(problem_, p.k, executor);
  }

  void run() {
    const int64_t count = static_cast<int64_t>(blocks_.list.size());
    for (int64_t first = 0; first < count;) {
      int64_t last = first;
      int64_t pairs = 0;
      for (; last < count; ++last) {
        pairs += rows(blocks_.list[last]) * width(blocks_.list[last]);
        if (last > first && pairs > kMaxPairs) break;
      }
      run_blocks(first, last);
      first = last;
    }
  }

 private:
  static constexpr int64_t kMaxPairs = int64_t{1} << 23;  // 32 to 160 MiB of scratch
  static constexpr int64_t kTileBytes = 192 * 1024;  // dk and dv of a range of keys: stays in a core's cache

  RowPlan plan(const Block& block, int64_t t) const {
    const Sequence& seq = problem_.sequences[block.sequence];
    return plan_row(visible(block.token + t, seq.tq, seq.tk, problem_.causal, seq.leftpad), problem_.budget,
                    problem_.sink, problem_.recent);
  }
  int64_t rows(const Block& block) const { return block.tokens * blocks_.group; }
  // Most kept keys of a row of the block: budgets do not fall along a sequence.
  int64_t width(const Block& block) const { return plan(block, block.tokens - 1).kept; }

  int64_t row_of(const Block& block, int64_t t, int64_t g) const {
    const Sequence& seq = problem_.sequences[block.sequence];
    return problem_.rows.at(seq.batch, block.kv_head * blocks_.group + g, seq.q_begin + block.token + t);
  }
  const int32_t* index(const Block& block, const BlockPairs<A>& pairs, int64_t t, int64_t g) const {
    return saved_ ? p_.kept_index + row_of(block, t, g) * p_.kept_width
                  : pairs.index.data() + (t * blocks_.group + g) * pairs.width;
  }
  const A* prob(const Block& block, const BlockPairs<A>& pairs, int64_t t, int64_t g) const {
    return saved_ ? static_cast<const A*>(p_.kept_prob) + row_of(block, t, g) * p_.kept_width
                  : pairs.prob.data() + (t * blocks_.group + g) * pairs.width;
  }

  void run_blocks(int64_t first, int64_t last) {
    std::vector<BlockPairs<A>> pairs(last - first);
    auto pass1 = [&](int64_t task, int64_t worker) {
      const Block& block = blocks_.list[first + task];
      BlockPairs<A>& mine = pairs[task];
      mine.width = width(block);
      mine.ds = Buffer<A>(rows(block) * mine.width);
      if (!saved_) recompute(block, mine, worker);
      row_gradients(block, mine, worker);
    };
    parallel(executor_, last - first, pass1);

    // Ranges of keys of every (sequence, KV head) in the run.
    const int64_t range = std::max<int64_t>(
        16, kTileBytes / (static_cast<int64_t>(sizeof(A)) * (problem_.head_dim + problem_.v_dim)));
    struct Task {
      int64_t first, last;  // blocks of one (sequence, KV head)
      Span keys;
    };
    std::vector<Task> tasks;
    for (int64_t b = first; b < last;) {
      const Block& block = blocks_.list[b];
      int64_t end = b;
      while (end < last && blocks_.list[end].sequence == block.sequence &&
             blocks_.list[end].kv_head == block.kv_head) {
        ++end;
      }
      const Block& final_block = blocks_.list[end - 1];
      const int64_t keys = plan(final_block, final_block.tokens - 1).seen.end;
      for (int64_t j = 0; j < keys; j += range) tasks.push_back({b, end, {j, std::min(j + range, keys)}});
      b = end;
    }
    auto pass2 = [&](int64_t index, int64_t) {
      const Task& task = tasks[index];
      for (int64_t b = task.first; b < task.last; ++b)
        key_gradients(blocks_.list[b], pairs[b - first], task.keys);
    };
    parallel(executor_, static_cast<int64_t>(tasks.size()), pass2);
  }

  // Kept lists and probabilities from the encoding and the scores, which have the forward's bits.
  void recompute(const Block& block, BlockPairs<A>& pairs, int64_t worker) {
    BlockScratch<A>& scratch = workers_.get(worker, blocks_, problem_.head_dim, problem_.v_dim);
    score_block<T>(problem_, p_.q, *keys_, blocks_, block, scratch);
    pairs.index = Buffer<int32_t>(rows(block) * pairs.width);
    pairs.prob = Buffer<A>(rows(block) * pairs.width);
    for (int64_t t = 0; t < block.tokens; ++t) {
      const RowPlan row_plan = plan(block, t);
      const A* scores = scratch.scores.data() + t * blocks_.group * scratch.stride;
      if (problem_.kv_group) {
        group_maximum(scores, scratch.stride, blocks_.group, row_plan.seen, scratch.row.group.data());
      }
      for (int64_t g = 0; g < blocks_.group; ++g) {
        const A* mine = scores + g * scratch.stride;
        const A* order = problem_.kv_group ? scratch.row.group.data() : mine;
        const int64_t row = row_of(block, t, g);
        const A threshold = static_cast<const A*>(p_.threshold)[row];
        const int32_t tie = p_.tie_index[row];
        int32_t* kept = pairs.index.data() + (t * blocks_.group + g) * pairs.width;
        int64_t count = 0;
        for (int64_t j = row_plan.seen.begin; j < row_plan.seen.end && count < row_plan.kept; ++j) {
          if (row_plan.always_kept(j) || admitted(order[j], j, threshold, tie))
            kept[count++] = static_cast<int32_t>(j);
        }
        A* weights = scratch.row.weights.data();
        for (int64_t i = 0; i < count; ++i) weights[i] = mine[kept[i]];
        softmax_kept(weights, count, static_cast<A>(problem_.softmax_scale));
        memcpy(pairs.prob.data() + (t * blocks_.group + g) * pairs.width, weights, count * sizeof(A));
      }
    }
  }

  // ds of every kept pair of the block, and dq of its rows.
  void row_gradients(const Block& block, BlockPairs<A>& pairs, int64_t worker) {
    const Sequence& seq = problem_.sequences[block.sequence];
    Buffer<A>& buffer = row_buffers_.get(worker, p_.problem.head_dim + p_.problem.v_dim + 64);
    A* dout = buffer.data();
    A* dq = buffer.data() + p_.problem.v_dim;
    const auto k_row = [&](int32_t j) { return at<T>(p_.k, seq.batch, seq.k_begin + j, block.kv_head); };
    const auto v_row = [&](int32_t j) { return at<T>(p_.v, seq.batch, seq.k_begin + j, block.kv_head); };
    for (int64_t t = 0; t < block.tokens; ++t) {
      const int64_t token = seq.q_begin + block.token + t;
      const int64_t count = plan(block, t).kept;
      for (int64_t g = 0; g < blocks_.group; ++g) {
        const int64_t head = block.kv_head * blocks_.group + g;
        const int64_t row = row_of(block, t, g);
        const int32_t* kept = index(block, pairs, t, g);
        const A* weights = prob(block, pairs, t, g);
        A* ds = pairs.ds.data() + (t * blocks_.group + g) * pairs.width;
        const T* dout_row = at<T>(p_.dout, seq.batch, token, head);
        T* dq_row = at_mutable<T>(p_.dq, seq.batch, token, head);
        // A row without attention mass (it sees nothing, or only -inf) has no gradient, whatever dO holds.
        if (static_cast<const A*>(p_.lse)[row] == -std::numeric_limits<A>::infinity()) {
          for (int64_t i = 0; i < count; ++i) ds[i] = 0;
          for (int64_t c = 0; c < problem_.head_dim; ++c) dq_row[c] = from_acc<T>(0);
          continue;
        }
        for (int64_t c = 0; c < problem_.v_dim; ++c) dout[c] = to_acc(dout_row[c]);
        bool accumulate = false;
        for_channel_pieces<A>(problem_.v_dim, [&](auto n, int64_t c) {
          gather_dot<T, decltype(n)::value>(kept, count, v_row, c, dout, accumulate, ds);
          accumulate = true;
        });
        A mean = 0;
        for (int64_t i = 0; i < count; ++i) mean += weights[i] * ds[i];
        if (p_.dlse != nullptr) mean -= static_cast<const A*>(p_.dlse)[row];
        const A scale = static_cast<A>(problem_.softmax_scale);
        for (int64_t i = 0; i < count; ++i) ds[i] = weights[i] * (ds[i] - mean) * scale;
        for_channel_pieces<A>(problem_.head_dim, [&](auto n, int64_t c) {
          gather_sum<T, decltype(n)::value>(kept, ds, count, k_row, c, dq);
        });
        for (int64_t c = 0; c < problem_.head_dim; ++c) dq_row[c] = from_acc<T>(dq[c]);
      }
    }
  }

  // Adds the block's kept pairs with keys in [keys.begin, keys.end) to dk and dv.
  void key_gradients(const Block& block, const BlockPairs<A>& pairs, const Span& keys) {
    const Sequence& seq = problem_.sequences[block.sequence];
    const auto dk_row = [&](int32_t j) {
      return at_mutable<A>(p_.dk, seq.batch, seq.k_begin + j, block.kv_head);
    };
    const auto dv_row = [&](int32_t j) {
      return at_mutable<A>(p_.dv, seq.batch, seq.k_begin + j, block.kv_head);
    };
    for (int64_t t = 0; t < block.tokens; ++t) {
      const RowPlan row_plan = plan(block, t);
      if (row_plan.kept == 0 || row_plan.seen.end <= keys.begin) continue;
      const int64_t token = seq.q_begin + block.token + t;
      for (int64_t g = 0; g < blocks_.group; ++g) {
        const int64_t row = row_of(block, t, g);
        if (static_cast<const A*>(p_.lse)[row] == -std::numeric_limits<A>::infinity()) continue;
        const int32_t* kept = index(block, pairs, t, g);
        const int32_t* kept_end = kept + row_plan.kept;
        const int32_t* begin = std::lower_bound(kept, kept_end, static_cast<int32_t>(keys.begin));
        const int32_t* end = std::lower_bound(begin, kept_end, static_cast<int32_t>(keys.end));
        const int64_t count = end - begin;
        if (count == 0) continue;
        const int64_t head = block.kv_head * blocks_.group + g;
        const A* weights = prob(block, pairs, t, g) + (begin - kept);
        const A* ds = pairs.ds.data() + (t * blocks_.group + g) * pairs.width + (begin - kept);
        const T* q_row = at<T>(p_.q, seq.batch, token, head);
        const T* dout_row = at<T>(p_.dout, seq.batch, token, head);
        for_channel_pieces<A>(problem_.head_dim, [&](auto n, int64_t c) {
          scatter_add<T, decltype(n)::value>(begin, ds, count, dk_row, c, q_row);
        });
        for_channel_pieces<A>(problem_.v_dim, [&](auto n, int64_t c) {
          scatter_add<T, decltype(n)::value>(begin, weights, count, dv_row, c, dout_row);
        });
      }
    }
  }

  const BackwardParams& p_;
  const Problem& problem_;
  const Executor& executor_;
  Blocks blocks_;
  bool saved_;
  std::unique_ptr<PackedKeys<T>> keys_;
  PerWorker<BlockScratch<A>> workers_;
  PerWorker<Buffer<A>> row_buffers_{executor_.workers};
};

template <typename T>
void backward(const BackwardParams& p, const Executor& executor) {
  Backward<T>(p, executor).run();
}
