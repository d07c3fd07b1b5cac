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
  A* ds = nullptr;
  int32_t* index = nullptr;  // nullptr: the forward's own lists are read
  A* prob = nullptr;
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

  // False when the kept lists or the encoding are not a selection of these keys; the gradients are then
  // unfinished.
  bool run() {
    const int64_t count = static_cast<int64_t>(blocks_.list.size());
    for (int64_t first = 0; first < count;) {
      int64_t last = first;
      int64_t pairs = 0;
      for (; last < count; ++last) {
        pairs += rows(blocks_.list[last]) * width(blocks_.list[last]);
        if (last > first && pairs > kMaxPairs) break;
      }
      run_blocks(first, last);
      if (foreign_.load()) return false;
      first = last;
    }
    return true;
  }

 private:
  static constexpr int64_t kMaxPairs = int64_t{1} << 20;  // 4 to 20 MiB of scratch
  static constexpr int64_t kGroupRows = 192;              // rows whose pairs are sorted by key together

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
                  : pairs.index + (t * blocks_.group + g) * pairs.width;
  }
  const A* prob(const Block& block, const BlockPairs<A>& pairs, int64_t t, int64_t g) const {
    return saved_ ? static_cast<const A*>(p_.kept_prob) + row_of(block, t, g) * p_.kept_width
                  : pairs.prob + (t * blocks_.group + g) * pairs.width;
  }

  void run_blocks(int64_t first, int64_t last) {
    std::vector<BlockPairs<A>> pairs(last - first);
    int64_t total = 0;
    for (int64_t b = first; b < last; ++b) {
      pairs[b - first].width = width(blocks_.list[b]);
      total += rows(blocks_.list[b]) * pairs[b - first].width;
    }
    reserve(total);
    total = 0;
    for (int64_t b = first; b < last; ++b) {
      BlockPairs<A>& mine = pairs[b - first];
      mine.ds = ds_.data() + total;
      if (!saved_) {
        mine.index = index_.data() + total;
        mine.prob = prob_.data() + total;
      }
      total += rows(blocks_.list[b]) * mine.width;
    }
    auto pass1 = [&](int64_t task, int64_t worker) {
      const Block& block = blocks_.list[first + task];
      BlockPairs<A>& mine = pairs[task];
      if (!saved_) recompute(block, mine, worker);
      if (!foreign_.load(std::memory_order_relaxed)) row_gradients(block, mine, worker);
    };
    parallel(executor_, last - first, pass1);

    if (foreign_.load()) return;
    key_gradients(first, last, pairs);
  }

  // Scratch for the pairs of a run; kept from run to run.
  void reserve(int64_t pairs) {
    if (ds_.size() >= pairs) return;
    ds_ = Buffer<A>(pairs);
    if (saved_) return;
    index_ = Buffer<int32_t>(pairs);
    prob_ = Buffer<A>(pairs);
  }

  // Kept lists and probabilities from the encoding and the scores, which have the forward's bits.
  void recompute(const Block& block, BlockPairs<A>& pairs, int64_t worker) {
    BlockScratch<A>& scratch = workers_.get(worker, blocks_, problem_.head_dim, problem_.v_dim);
    score_block<T>(problem_, p_.q, *keys_, blocks_, block, scratch);
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
        int32_t* kept = pairs.index + (t * blocks_.group + g) * pairs.width;
        int64_t count = 0;
        for (int64_t j = row_plan.seen.begin; j < row_plan.seen.end && count < row_plan.kept; ++j) {
          if (row_plan.always_kept(j) || admitted(order[j], j, threshold, tie))
            kept[count++] = static_cast<int32_t>(j);
        }
        if (count < row_plan.kept) {
          foreign_.store(true);
          return;
        }
        A* weights = scratch.row.weights.data();
        for (int64_t i = 0; i < count; ++i) weights[i] = mine[kept[i]];
        softmax_kept(weights, count, static_cast<A>(problem_.softmax_scale));
        memcpy(pairs.prob + (t * blocks_.group + g) * pairs.width, weights, count * sizeof(A));
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
      const RowPlan row_plan = plan(block, t);
      const Span row_seen = row_plan.seen;
      const int64_t count = row_plan.kept;
      for (int64_t g = 0; g < blocks_.group; ++g) {
        const int64_t head = block.kv_head * blocks_.group + g;
        const int64_t row = row_of(block, t, g);
        const int32_t* kept = index(block, pairs, t, g);
        const A* weights = prob(block, pairs, t, g);
        A* ds = pairs.ds + (t * blocks_.group + g) * pairs.width;
        if (saved_ && !ascending(kept, count, row_seen)) {
          foreign_.store(true);
          return;
        }
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
          gather_sum<T, decltype(n)::value>(kept, ds, count, k_row, c, false, dq);
        });
        for (int64_t c = 0; c < problem_.head_dim; ++c) dq_row[c] = from_acc<T>(dq[c]);
      }
    }
  }

  // Are these distinct visible keys in ascending order? Lists from outside are never used as addresses
  // unchecked.
  static bool ascending(const int32_t* kept, int64_t count, const Span& seen) {
    int64_t previous = seen.begin - 1;
    bool good = true;
    for (int64_t i = 0; i < count; ++i) {
      good &= kept[i] > previous;
      previous = kept[i];
    }
    return good && previous < seen.end;
  }

  // dk and dv of the run, parallel over ranges of keys of each (sequence, KV head).
  void key_gradients(int64_t first, int64_t last, const std::vector<BlockPairs<A>>& pairs) {
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
      const RowPlan final_row = plan(blocks_.list[end - 1], blocks_.list[end - 1].tokens - 1);
      const int64_t keys = final_row.seen.end;
      // About 16 pairs a row, within 128 to 384 keys: long enough to be worth finding, short enough to stay
      // in cache.
      const int64_t range = std::clamp<int64_t>(16 * keys / std::max<int64_t>(1, final_row.kept), 128, 384);
      for (int64_t j = 0; j < keys; j += range) tasks.push_back({b, end, {j, std::min(j + range, keys)}});
      b = end;
    }
    auto body = [&](int64_t index, int64_t worker) {
      const Task& task = tasks[index];
      KeyScratch& scratch = key_scratch_.get(worker);
      const int64_t step = std::max<int64_t>(1, kGroupRows / blocks_.max_rows);
      for (int64_t b = task.first; b < task.last; b += step) {
        group_key_gradients(b, std::min(b + step, task.last), pairs.data() + (b - first), task.keys, scratch);
      }
    };
    parallel(executor_, static_cast<int64_t>(tasks.size()), body);
  }

  // The pairs of a few blocks with keys in one range, sorted by key (stable: rows stay ascending).
  struct KeyScratch {
    struct Piece {  // one row's part of the range
      const int32_t* index;
      const A* prob;
      const A* ds;
      int64_t count;
    };
    std::vector<Piece> pieces;
    std::vector<const T*> q, dout;  // by row of the group
    Buffer<int32_t> start;          // by key, then one more
    Buffer<int32_t> row;
    Buffer<A> prob, ds;
  };

  void group_key_gradients(int64_t first, int64_t last, const BlockPairs<A>* pairs, const Span& keys,
                           KeyScratch& s) {
    s.pieces.clear();
    s.q.clear();
    s.dout.clear();
    int64_t total = 0;
    for (int64_t b = first; b < last; ++b) {
      const Block& block = blocks_.list[b];
      const Sequence& seq = problem_.sequences[block.sequence];
      for (int64_t t = 0; t < block.tokens; ++t) {
        const RowPlan row_plan = plan(block, t);
        if (row_plan.kept == 0 || row_plan.seen.end <= keys.begin) continue;
        for (int64_t g = 0; g < blocks_.group; ++g) {
          const int64_t row = row_of(block, t, g);
          if (static_cast<const A*>(p_.lse)[row] == -std::numeric_limits<A>::infinity()) continue;
          const BlockPairs<A>& mine = pairs[b - first];
          const int32_t* kept = index(block, mine, t, g);
          const int32_t* kept_end = kept + row_plan.kept;
          const int32_t* begin = std::lower_bound(kept, kept_end, static_cast<int32_t>(keys.begin));
          const int32_t* end = std::lower_bound(begin, kept_end, static_cast<int32_t>(keys.end));
          if (begin == end) continue;
          const int64_t offset = begin - kept;
          s.pieces.push_back({begin, prob(block, mine, t, g) + offset,
                              mine.ds + (t * blocks_.group + g) * mine.width + offset, end - begin});
          const int64_t token = seq.q_begin + block.token + t;
          s.q.push_back(at<T>(p_.q, seq.batch, token, block.kv_head * blocks_.group + g));
          s.dout.push_back(at<T>(p_.dout, seq.batch, token, block.kv_head * blocks_.group + g));
          total += end - begin;
        }
      }
    }
    if (total == 0) return;
    const int64_t n = keys.size();
    if (s.start.size() < n + 1) s.start = Buffer<int32_t>(n + 1);
    if (s.row.size() < total) {
      s.row = Buffer<int32_t>(total);
      s.prob = Buffer<A>(total);
      s.ds = Buffer<A>(total);
    }
    int32_t* start = s.start.data();
    memset(start, 0, (n + 1) * sizeof *start);
    for (const auto& piece : s.pieces) {
      for (int64_t i = 0; i < piece.count; ++i) ++start[piece.index[i] - keys.begin];
    }
    int32_t sum = 0;
    for (int64_t j = 0; j <= n; ++j) {
      const int32_t count = start[j];
      start[j] = sum;
      sum += count;
    }
    for (size_t r = 0; r < s.pieces.size(); ++r) {
      const auto& piece = s.pieces[r];
      for (int64_t i = 0; i < piece.count; ++i) {
        const int32_t to = start[piece.index[i] - keys.begin]++;
        s.row[to] = static_cast<int32_t>(r);
        s.prob[to] = piece.prob[i];
        s.ds[to] = piece.ds[i];
      }
    }
    const Block& block = blocks_.list[first];
    const Sequence& seq = problem_.sequences[block.sequence];
    const auto q_row = [&](int32_t r) { return s.q[r]; };
    const auto dout_row = [&](int32_t r) { return s.dout[r]; };
    // The fill has moved start[j] to the end of key j's pairs.
    for (int64_t j = 0, begin = 0; j < n; begin = start[j++]) {
      const int64_t count = start[j] - begin;
      if (count == 0) continue;
      A* dk = at_mutable<A>(p_.dk, seq.batch, seq.k_begin + keys.begin + j, block.kv_head);
      A* dv = at_mutable<A>(p_.dv, seq.batch, seq.k_begin + keys.begin + j, block.kv_head);
      for_channel_pieces<A>(problem_.head_dim, [&](auto m, int64_t c) {
        gather_sum<T, decltype(m)::value>(s.row.data() + begin, s.ds.data() + begin, count, q_row, c, true,
                                          dk);
      });
      for_channel_pieces<A>(problem_.v_dim, [&](auto m, int64_t c) {
        gather_sum<T, decltype(m)::value>(s.row.data() + begin, s.prob.data() + begin, count, dout_row, c,
                                          true, dv);
      });
    }
  }

  const BackwardParams& p_;
  const Problem& problem_;
  const Executor& executor_;
  Blocks blocks_;
  bool saved_;
  Buffer<A> ds_, prob_;
  Buffer<int32_t> index_;
  std::unique_ptr<PackedKeys<T>> keys_;
  PerWorker<BlockScratch<A>> workers_;
  PerWorker<Buffer<A>> row_buffers_{executor_.workers};
  PerWorker<KeyScratch> key_scratch_{executor_.workers};
  std::atomic<bool> foreign_{false};
};

template <typename T>
bool backward(const BackwardParams& p, const Executor& executor) {
  return Backward<T>(p, executor).run();
}
