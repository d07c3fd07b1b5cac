// Training backward: dQ, dK, dV over the kept pairs only; the selection is a constant.
//
// With p the probability of a kept pair and dp = dO . v: ds = p * (dp - sum(p * dp) + dlse) * scale, dq += ds
// * k, dk += ds * q, dv += p * dO. Rows are taken in runs whose kept pairs fit a fixed scratch. In a run,
// pass 1 (parallel over groups of rows) makes ds and dq and lays the pairs out by range of keys; pass 2
// (parallel over ranges of keys) sorts a group's pairs of its range by key and adds to dk and dv in ascending
// row order. Every sum has one order whatever the number of threads: always deterministic. The kept lists
// come from the forward, or are made again from the encoding with the same scores.

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
        max_pairs_(std::min(kPairsPerWorker * executor.workers, kMaxPairs)),
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
        pairs += room(blocks_.list[last]);
        if (last > first && pairs > max_pairs_) break;
      }
      lay_out(first, last);
      auto pass1 = [&](int64_t task, int64_t worker) {
        if (!foreign_.load(std::memory_order_relaxed)) row_gradients(groups_[task], worker);
      };
      parallel(executor_, static_cast<int64_t>(groups_.size()), pass1);
      if (foreign_.load()) return false;
      auto pass2 = [&](int64_t task, int64_t worker) { key_gradients(tasks_[task], worker); };
      parallel(executor_, static_cast<int64_t>(tasks_.size()), pass2);
      first = last;
    }
    return true;
  }

 private:
  static constexpr int64_t kPairsPerWorker = int64_t{1} << 20;  // 12 MiB of scratch in float32
  static constexpr int64_t kMaxPairs = int64_t{1} << 23;
  static constexpr int64_t kTasksPerWorker = 4;  // groups of a run, so that uneven ones balance

  // Blocks of one (sequence, KV head) in the run, and how their keys are cut.
  struct Segment {
    int64_t first_group, last_group;
    int64_t range;  // keys of a range
  };
  // A group's pairs lie together: by range, then row (token-major, then head), then key.
  struct PairGroup {
    Group blocks;
    int64_t range;
    int64_t rows;
    int64_t ranges;  // up to the last key its last row sees
    int64_t pair;    // its first pair in index_, prob_ and ds_
    int64_t piece;   // its first entry in pieces_: pairs of row r in range i at i * rows + r
    int64_t start;   // its first entry in starts_: pairs before range i
  };
  struct KeyTask {
    int64_t segment;
    int64_t range;
  };

  RowPlan plan(const Block& block, int64_t t) const {
    const Sequence& seq = problem_.sequences[block.sequence];
    return plan_row(visible(block.token + t, seq.tq, seq.tk, problem_.causal, seq.leftpad), problem_.budget,
                    problem_.sink, problem_.recent);
  }
  int64_t rows(const Block& block) const { return block.tokens * blocks_.group; }
  // Most kept keys of a row of the block: budgets do not fall along a sequence.
  int64_t width(const Block& block) const { return plan(block, block.tokens - 1).kept; }
  int64_t room(const Block& block) const { return rows(block) * width(block); }
  bool dead(int64_t row) const {
    return static_cast<const A*>(p_.lse)[row] == -std::numeric_limits<A>::infinity();
  }

  int64_t row_of(const Block& block, int64_t t, int64_t g) const {
    const Sequence& seq = problem_.sequences[block.sequence];
    return problem_.rows.at(seq.batch, block.kv_head * blocks_.group + g, seq.q_begin + block.token + t);
  }

  // Groups, ranges and scratch of a run of blocks.
  void lay_out(int64_t first, int64_t last) {
    segments_.clear();
    groups_.clear();
    tasks_.clear();
    int64_t pairs = 0;
    for (int64_t b = first; b < last; ++b) pairs += room(blocks_.list[b]);
    const int64_t group_pairs = pairs / (kTasksPerWorker * executor_.workers);
    const int64_t row_bytes = std::max(problem_.head_dim, problem_.v_dim) * static_cast<int64_t>(sizeof(A));
    pairs = 0;
    int64_t pieces = 0, starts = 0;
    for (int64_t b = first; b < last;) {
      const Block& block = blocks_.list[b];
      int64_t end = b;
      while (end < last && blocks_.list[end].sequence == block.sequence &&
             blocks_.list[end].kv_head == block.kv_head) {
        ++end;
      }
      const RowPlan final_row = plan(blocks_.list[end - 1], blocks_.list[end - 1].tokens - 1);
      Segment segment;
      segment.first_group = static_cast<int64_t>(groups_.size());
      segment.range = range_of(final_row.seen.end, final_row.kept, row_bytes);
      while (b < end) {
        PairGroup group{{b, b}, segment.range, 0, 0, pairs, pieces, starts};
        int64_t mine = 0;
        do {
          group.rows += rows(blocks_.list[b]);
          mine += room(blocks_.list[b]);
          ++b;
        } while (b < end && group.rows + rows(blocks_.list[b]) <= kGroupRows &&
                 mine + room(blocks_.list[b]) <= group_pairs);
        group.blocks.last = b;
        const Block& bottom = blocks_.list[b - 1];
        group.ranges = (plan(bottom, bottom.tokens - 1).seen.end + segment.range - 1) / segment.range;
        pairs += mine;
        pieces += group.rows * group.ranges;
        starts += group.ranges + 1;
        groups_.push_back(group);
      }
      segment.last_group = static_cast<int64_t>(groups_.size());
      for (int64_t i = 0; i < groups_.back().ranges; ++i) {
        tasks_.push_back({static_cast<int64_t>(segments_.size()), i});
      }
      segments_.push_back(segment);
    }
    reserve(index_, pairs);
    reserve(prob_, pairs);
    reserve(ds_, pairs);
    reserve(pieces_, pieces);
    reserve(starts_, starts);
  }

  // Rows of a group in pass 1.
  struct RowScratch {
    struct Row {
      const int32_t* kept;  // what is left of its lists
      const A* prob;
      int64_t left;
      int32_t previous;  // the key before
      int32_t end;       // one past the last key it sees
      A mean;            // sum of p * dp
    };
    std::vector<Row> rows;
    Buffer<A> dout, dq;     // (rows, channels)
    Buffer<int32_t> index;  // lists that the forward has not saved
    Buffer<A> prob;
  };

  // Kept lists and probabilities of one block (rows at `width`) from the encoding and the scores, which have
  // the forward's bits.
  bool recompute(const Block& block, int64_t width, int32_t* index, A* prob, int64_t worker) {
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
        int32_t* kept = index + (t * blocks_.group + g) * width;
        int64_t count = 0;
        for (int64_t j = row_plan.seen.begin; j < row_plan.seen.end && count < row_plan.kept; ++j) {
          if (row_plan.always_kept(j) || admitted(order[j], j, threshold, tie))
            kept[count++] = static_cast<int32_t>(j);
        }
        if (count < row_plan.kept) return false;
        A* weights = scratch.row.weights.data();
        for (int64_t i = 0; i < count; ++i) weights[i] = mine[kept[i]];
        softmax_kept(weights, count, static_cast<A>(problem_.softmax_scale));
        memcpy(prob + (t * blocks_.group + g) * width, weights, count * sizeof(A));
      }
    }
    return true;
  }

  // The group's rows: their lists, dO in A, and dq = 0.
  bool load_group(const PairGroup& group, RowScratch& s, int64_t worker) {
    const int64_t v_dim = problem_.v_dim;
    reserve(s.dout, group.rows * v_dim);
    reserve(s.dq, group.rows * problem_.head_dim);
    memset(s.dq.data(), 0, group.rows * problem_.head_dim * sizeof(A));
    if (!saved_) {
      int64_t pairs = 0;
      for (int64_t b = group.blocks.first; b < group.blocks.last; ++b) pairs += room(blocks_.list[b]);
      reserve(s.index, pairs);
      reserve(s.prob, pairs);
    }
    s.rows.clear();
    A* dout = s.dout.data();
    int32_t* index = s.index.data();
    A* prob = s.prob.data();
    for (int64_t b = group.blocks.first; b < group.blocks.last; ++b) {
      const Block& block = blocks_.list[b];
      const Sequence& seq = problem_.sequences[block.sequence];
      const int64_t list_width = saved_ ? p_.kept_width : width(block);
      if (!saved_ && !recompute(block, list_width, index, prob, worker)) return false;
      for (int64_t t = 0; t < block.tokens; ++t) {
        const RowPlan row_plan = plan(block, t);
        for (int64_t g = 0; g < blocks_.group; ++g, dout += v_dim) {
          const int64_t row = row_of(block, t, g);
          const int64_t at_list = (saved_ ? row : t * blocks_.group + g) * list_width;
          // A row without attention mass (it sees nothing, or only -inf) has no gradient, whatever dO holds.
          s.rows.push_back({(saved_ ? p_.kept_index : index) + at_list,
                            (saved_ ? static_cast<const A*>(p_.kept_prob) : prob) + at_list,
                            dead(row) ? 0 : row_plan.kept, static_cast<int32_t>(row_plan.seen.begin - 1),
                            static_cast<int32_t>(row_plan.seen.end), 0});
          const T* source =
              at<T>(p_.dout, seq.batch, seq.q_begin + block.token + t, block.kv_head * blocks_.group + g);
          for (int64_t c = 0; c < v_dim; ++c) dout[c] = to_acc(source[c]);
        }
      }
      if (!saved_) {
        index += room(block);
        prob += room(block);
      }
    }
    return true;
  }

  // Moves the row's pairs with keys below `limit` to index and prob; returns how many, or -1 when they are
  // not distinct visible keys in ascending order: lists from outside are never used as addresses unchecked.
  static int64_t take_piece(typename RowScratch::Row& row, int32_t limit, int32_t* index, A* prob) {
    limit = std::min(limit, row.end);
    int32_t previous = row.previous;
    bool good = true;
    int64_t n = 0;
    for (; n < row.left && row.kept[n] < limit; ++n) {
      const int32_t key = row.kept[n];
      good &= key > previous;
      previous = key;
      index[n] = key;
      prob[n] = row.prob[n];
    }
    row.kept += n;
    row.prob += n;
    row.left -= n;
    row.previous = previous;
    return good ? n : -1;
  }

  // ds of every kept pair of the group, and dq of its rows.
  void row_gradients(const PairGroup& group, int64_t worker) {
    RowScratch& s = row_scratch_.get(worker);
    if (!load_group(group, s, worker)) return foreign_.store(true);
    const Block& block = blocks_.list[group.blocks.first];
    const Sequence& seq = problem_.sequences[block.sequence];
    const int64_t head_dim = problem_.head_dim, v_dim = problem_.v_dim;
    const HeadRows<T> k_row = key_rows<T>(p_.k, seq, block.kv_head);
    const HeadRows<T> v_row = key_rows<T>(p_.v, seq, block.kv_head);
    int32_t* index = index_.data() + group.pair;
    A* prob = prob_.data() + group.pair;
    A* ds = ds_.data() + group.pair;
    int32_t* start = starts_.data() + group.start;

    // dp = dO . v, and its mean.
    int64_t taken = 0;
    for (int64_t i = 0; i < group.ranges; ++i) {
      int32_t* piece = pieces_.data() + group.piece + i * group.rows;
      start[i] = static_cast<int32_t>(taken);
      const int32_t limit =
          static_cast<int32_t>(std::min<int64_t>((i + 1) * group.range, std::numeric_limits<int32_t>::max()));
      for (int64_t r = 0; r < group.rows; ++r) {
        const int64_t n = take_piece(s.rows[r], limit, index + taken, prob + taken);
        if (n < 0) return foreign_.store(true);
        piece[r] = static_cast<int32_t>(n);
        taken += n;
      }
      int64_t pair = start[i];
      for (int64_t r = 0; r < group.rows; ++r) {
        const int64_t n = piece[r];
        const A* dout = s.dout.data() + r * v_dim;
        bool accumulate = false;
        for_channel_pieces<A>(v_dim, [&](auto m, int64_t c) {
          gather_dot<T, decltype(m)::value>(index + pair, n, taken - pair, v_row, c, dout, accumulate,
                                            ds + pair);
          accumulate = true;
        });
        A mean = s.rows[r].mean;
        for (int64_t e = pair; e < pair + n; ++e) mean += prob[e] * ds[e];
        s.rows[r].mean = mean;
        pair += n;
      }
    }
    start[group.ranges] = static_cast<int32_t>(taken);

    const A* dlse = static_cast<const A*>(p_.dlse);
    int64_t r = 0;
    for_rows(group, [&](const Block& b, int64_t t, int64_t g) {
      if (s.rows[r].left > 0) foreign_.store(true);
      if (dlse != nullptr) s.rows[r].mean -= dlse[row_of(b, t, g)];
      ++r;
    });

    const A scale = static_cast<A>(problem_.softmax_scale);
    int64_t pair = 0;
    const int32_t* piece = pieces_.data() + group.piece;
    for (int64_t i = 0; i < group.ranges; ++i) {
      for (r = 0; r < group.rows; ++r) {
        const int64_t n = *piece++;
        if (n == 0) continue;
        const A mean = s.rows[r].mean;
        for (int64_t e = pair; e < pair + n; ++e) ds[e] = prob[e] * (ds[e] - mean) * scale;
        for_channel_pieces<A>(head_dim, [&](auto m, int64_t c) {
          gather_sum<T, decltype(m)::value>(index + pair, ds + pair, n, taken - pair, k_row, c, true,
                                            s.dq.data() + r * head_dim);
        });
        pair += n;
      }
    }

    const A* dq = s.dq.data();
    for_rows(group, [&](const Block& b, int64_t t, int64_t g) {
      T* out = at_mutable<T>(p_.dq, seq.batch, seq.q_begin + b.token + t, b.kv_head * blocks_.group + g);
      for (int64_t c = 0; c < head_dim; ++c) out[c] = from_acc<T>(*dq++);
    });
  }

  // body(block, t, g) for the rows of a group in order.
  template <typename Body>
  void for_rows(const PairGroup& group, Body body) const {
    for (int64_t b = group.blocks.first; b < group.blocks.last; ++b) {
      const Block& block = blocks_.list[b];
      for (int64_t t = 0; t < block.tokens; ++t) {
        for (int64_t g = 0; g < blocks_.group; ++g) body(block, t, g);
      }
    }
  }

  // A group's pairs of one range, sorted by key (stable: rows stay ascending).
  struct KeyScratch {
    std::vector<const T*> q, dout;  // by row of the group
    Buffer<int32_t> start;          // by key, then one more
    Buffer<int32_t> row;
    Buffer<A> prob, ds;
  };

  // dk and dv of the keys of one range, over all groups of the segment.
  void key_gradients(const KeyTask& task, int64_t worker) {
    KeyScratch& scratch = key_scratch_.get(worker);
    const Segment& segment = segments_[task.segment];
    for (int64_t i = segment.first_group; i < segment.last_group; ++i) {
      if (task.range < groups_[i].ranges) group_key_gradients(groups_[i], task.range, scratch);
    }
  }

  void group_key_gradients(const PairGroup& group, int64_t range, KeyScratch& s) {
    const int32_t* starts = starts_.data() + group.start + range;
    const int64_t total = starts[1] - starts[0];
    if (total == 0) return;
    const int32_t* index = index_.data() + group.pair + starts[0];
    const A* prob = prob_.data() + group.pair + starts[0];
    const A* ds = ds_.data() + group.pair + starts[0];
    const int32_t* piece = pieces_.data() + group.piece + range * group.rows;
    const int32_t first_key = static_cast<int32_t>(range * group.range);

    const Block& block = blocks_.list[group.blocks.first];
    const Sequence& seq = problem_.sequences[block.sequence];
    s.q.clear();
    s.dout.clear();
    for_rows(group, [&](const Block& b, int64_t t, int64_t g) {
      const int64_t head = b.kv_head * blocks_.group + g;
      s.q.push_back(at<T>(p_.q, seq.batch, seq.q_begin + b.token + t, head));
      s.dout.push_back(at<T>(p_.dout, seq.batch, seq.q_begin + b.token + t, head));
    });

    const int64_t n = group.range;
    reserve(s.start, n + 1);
    reserve(s.row, total);
    reserve(s.prob, total);
    reserve(s.ds, total);
    int32_t* start = s.start.data();
    memset(start, 0, (n + 1) * sizeof *start);
    for (int64_t e = 0; e < total; ++e) ++start[index[e] - first_key];
    int32_t sum = 0;
    for (int64_t j = 0; j <= n; ++j) {
      const int32_t count = start[j];
      start[j] = sum;
      sum += count;
    }
    for (int64_t r = 0, e = 0; r < group.rows; ++r) {
      for (const int64_t end = e + piece[r]; e < end; ++e) {
        const int32_t to = start[index[e] - first_key]++;
        s.row[to] = static_cast<int32_t>(r);
        s.prob[to] = prob[e];
        s.ds[to] = ds[e];
      }
    }
    const auto q_row = [rows = s.q.data()](int32_t r) { return rows[r]; };
    const auto dout_row = [rows = s.dout.data()](int32_t r) { return rows[r]; };
    // The fill has moved start[j] to the end of key j's pairs.
    for (int64_t j = 0, begin = 0; j < n; begin = start[j++]) {
      const int64_t count = start[j] - begin;
      if (count == 0) continue;
      A* dk = at_mutable<A>(p_.dk, seq.batch, seq.k_begin + first_key + j, block.kv_head);
      A* dv = at_mutable<A>(p_.dv, seq.batch, seq.k_begin + first_key + j, block.kv_head);
      for_channel_pieces<A>(problem_.head_dim, [&](auto m, int64_t c) {
        gather_sum<T, decltype(m)::value>(s.row.data() + begin, s.ds.data() + begin, count, 0, q_row, c, true,
                                          dk);
      });
      for_channel_pieces<A>(problem_.v_dim, [&](auto m, int64_t c) {
        gather_sum<T, decltype(m)::value>(s.row.data() + begin, s.prob.data() + begin, count, 0, dout_row, c,
                                          true, dv);
      });
    }
  }

  const BackwardParams& p_;
  const Problem& problem_;
  const Executor& executor_;
  Blocks blocks_;
  bool saved_;
  int64_t max_pairs_;
  std::vector<Segment> segments_;
  std::vector<PairGroup> groups_;
  std::vector<KeyTask> tasks_;
  Buffer<int32_t> index_, pieces_, starts_;
  Buffer<A> prob_, ds_;
  std::unique_ptr<PackedKeys<T>> keys_;
  PerWorker<BlockScratch<A>> workers_;
  PerWorker<RowScratch> row_scratch_{executor_.workers};
  PerWorker<KeyScratch> key_scratch_{executor_.workers};
  std::atomic<bool> foreign_{false};
};

template <typename T>
bool backward(const BackwardParams& p, const Executor& executor) {
  return Backward<T>(p, executor).run();
}
