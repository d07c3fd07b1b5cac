// Training forward: selection, and attention over the selected keys, one block of query rows at a time.
//
// Cost: half a dense forward for the scores, one filtering pass over them, and work in proportion to the kept
// pairs for everything after. V is gathered for a group of blocks at once, range of keys by range, where the
// values of a sequence do not fit near the core. Memory beyond the outputs: the packed copy of K, and per
// worker one block of scores and the kept lists of one group.

// Encoding and, where wanted, the kept list of one row.
template <typename A>
void write_selection(const ForwardParams& p, int64_t row, const Encoding<A>& encoding, int64_t count,
                     const int32_t* kept) {
  static_cast<A*>(p.threshold)[row] = encoding.threshold;
  p.tie_index[row] = encoding.tie_index;
  if (p.kept_index == nullptr) return;
  int32_t* out = p.kept_index + row * p.kept_width;
  memcpy(out, kept, count * sizeof *out);
  if (p.pad_index) {
    for (int64_t i = count; i < p.kept_width; ++i) out[i] = -1;
  }
}

// Rows of a group that wait for their V rows.
template <typename A>
struct GroupScratch {
  struct Row {
    const int32_t* kept;  // what is left of its lists
    const A* weights;
    int64_t left;
  };
  std::vector<Row> rows;
  Buffer<A> sums;        // (rows, v_dim)
  Buffer<int32_t> kept;  // lists that the caller does not want
  Buffer<A> weights;
};

template <typename T>
class Forward {
 public:
  using A = acc_t<T>;
  Forward(const ForwardParams& p, const Executor& executor)
      : p_(p),
        problem_(p.problem),
        executor_(executor),
        blocks_(make_blocks<A>(problem_)),
        keys_(problem_, p.k, executor),
        block_scratch_(executor.workers),
        group_scratch_(executor.workers) {}

  void run() {
    const std::vector<Group> groups = make_groups();
    const int64_t count = static_cast<int64_t>(groups.size());
    auto body = [&](int64_t task, int64_t worker) {
      // The longest blocks first: causal rows late in a sequence see the most keys.
      run_group(groups[count - 1 - task], worker);
    };
    parallel(executor_, count, body);
  }

 private:
  static constexpr int64_t kTasksPerWorker = 8;  // so that uneven groups balance
  static constexpr int64_t kGroupPairs = int64_t{1} << 19;

  std::vector<Group> make_groups() const {
    const int64_t count = static_cast<int64_t>(blocks_.list.size());
    const int64_t most =
        std::min(kGroupRows / blocks_.max_rows, count / (kTasksPerWorker * executor_.workers));
    std::vector<Group> groups;
    for (int64_t b = 0; b < count;) {
      const Block& block = blocks_.list[b];
      const int64_t first = b++;
      while (b < count && b - first < most && blocks_.list[b].sequence == block.sequence &&
             blocks_.list[b].kv_head == block.kv_head &&
             (b + 1 - first) * blocks_.max_rows * width(blocks_.list[b]) <= kGroupPairs) {
        ++b;
      }
      groups.push_back({first, b});
    }
    return groups;
  }

  RowPlan plan(const Block& block, int64_t t) const {
    const Sequence& seq = problem_.sequences[block.sequence];
    return plan_row(visible(block.token + t, seq.tq, seq.tk, problem_.causal, seq.leftpad), problem_.budget,
                    problem_.sink, problem_.recent);
  }

  // Most kept keys of a row of the block: budgets do not fall along a sequence.
  int64_t width(const Block& block) const { return plan(block, block.tokens - 1).kept; }

  void run_group(const Group& group, int64_t worker) {
    GroupScratch<A>& s = group_scratch_.get(worker);
    s.rows.clear();
    const int64_t list_width = width(blocks_.list[group.last - 1]);
    const int64_t room = (group.last - group.first) * blocks_.max_rows * list_width;
    if (p_.attend && p_.kept_prob == nullptr) {
      reserve(s.kept, room + 1);
      reserve(s.weights, room + 1);
    }
    for (int64_t b = group.first; b < group.last; ++b) select_block(blocks_.list[b], list_width, s, worker);
    if (p_.attend) gather_values(group, s);
  }

  // Scores and selection of one block; probabilities and lse of its rows.
  void select_block(const Block& block, int64_t list_width, GroupScratch<A>& s, int64_t worker) {
    BlockScratch<A>& scratch = block_scratch_.get(worker, blocks_, problem_.head_dim, problem_.v_dim);
    const Sequence& seq = problem_.sequences[block.sequence];
    const int64_t group = blocks_.group;
    score_block<T>(problem_, p_.q, keys_, blocks_, block, scratch);
    for (int64_t t = 0; t < block.tokens; ++t) {
      const RowPlan row_plan = plan(block, t);
      const A* scores = scratch.scores.data() + t * group * scratch.stride;
      Encoding<A> encoding;
      if (problem_.kv_group) {
        group_maximum(scores, scratch.stride, group, row_plan.seen, scratch.row.group.data());
        encoding = keep_row(scratch.row.group.data(), row_plan, scratch.row);
      }
      for (int64_t g = 0; g < group; ++g) {
        const A* mine = scores + g * scratch.stride;
        const int64_t head = block.kv_head * group + g;
        const int64_t row = problem_.rows.at(seq.batch, head, seq.q_begin + block.token + t);
        if (!problem_.kv_group) encoding = keep_row(mine, row_plan, scratch.row);
        const int32_t* kept = scratch.row.kept.data();
        write_selection(p_, row, encoding, row_plan.kept, kept);
        if (!p_.attend) continue;
        const A lse = kept_weights(mine, kept, row_plan.kept, static_cast<A>(problem_.softmax_scale),
                                   scratch.row.weights.data());
        static_cast<A*>(p_.lse)[row] = lse;
        const int32_t* list;
        A* weights;
        if (p_.kept_prob != nullptr) {
          list = p_.kept_index + row * p_.kept_width;
          weights = static_cast<A*>(p_.kept_prob) + row * p_.kept_width;
        } else {
          const int64_t at_list = static_cast<int64_t>(s.rows.size()) * list_width;
          memcpy(s.kept.data() + at_list, kept, row_plan.kept * sizeof *kept);
          list = s.kept.data() + at_list;
          weights = s.weights.data() + at_list;
        }
        memcpy(weights, scratch.row.weights.data(), row_plan.kept * sizeof(A));
        // A row without attention mass gives zeros, whatever V holds.
        const bool dead = lse == -std::numeric_limits<A>::infinity();
        s.rows.push_back({list, weights, dead ? 0 : row_plan.kept});
      }
    }
  }

  // out of the group's rows.
  void gather_values(const Group& group, GroupScratch<A>& s) {
    const Block& block = blocks_.list[group.first];
    const Block& bottom = blocks_.list[group.last - 1];
    const Sequence& seq = problem_.sequences[block.sequence];
    const RowPlan final_row = plan(bottom, bottom.tokens - 1);
    const int64_t keys = final_row.seen.end;
    const int64_t v_dim = problem_.v_dim;
    const int64_t rows = static_cast<int64_t>(s.rows.size());
    const int64_t range = group.last - group.first == 1
                              ? std::max<int64_t>(1, keys)
                              : range_of(keys, final_row.kept, v_dim * static_cast<int64_t>(sizeof(T)));
    const HeadRows<T> v_row = key_rows<T>(p_.v, seq, block.kv_head);
    reserve(s.sums, rows * v_dim);
    memset(s.sums.data(), 0, rows * v_dim * sizeof(A));
    for (int64_t begin = 0; begin < keys; begin += range) {
      const int64_t limit = begin + range;
      for (int64_t r = 0; r < rows; ++r) {
        auto& row = s.rows[r];
        int64_t n = 0;
        if (limit < keys) {
          while (n < row.left && row.kept[n] < limit) ++n;
        } else {
          n = row.left;
        }
        if (n == 0) continue;
        for_channel_pieces<A>(v_dim, [&](auto m, int64_t c) {
          gather_sum<T, decltype(m)::value>(row.kept, row.weights, n, row.left, v_row, c, true,
                                            s.sums.data() + r * v_dim);
        });
        row.kept += n;
        row.weights += n;
        row.left -= n;
      }
    }
    const A* sums = s.sums.data();
    for (int64_t b = group.first; b < group.last; ++b) {
      const Block& mine = blocks_.list[b];
      for (int64_t t = 0; t < mine.tokens; ++t) {
        for (int64_t g = 0; g < blocks_.group; ++g) {
          T* out = at_mutable<T>(p_.out, seq.batch, seq.q_begin + mine.token + t,
                                 mine.kv_head * blocks_.group + g);
          for (int64_t c = 0; c < v_dim; ++c) out[c] = from_acc<T>(*sums++);
        }
      }
    }
  }

  const ForwardParams& p_;
  const Problem& problem_;
  const Executor& executor_;
  Blocks blocks_;
  PackedKeys<T> keys_;
  PerWorker<BlockScratch<A>> block_scratch_;
  PerWorker<GroupScratch<A>> group_scratch_;
};

template <typename T>
void forward(const ForwardParams& p, const Executor& executor) {
  Forward<T>(p, executor).run();
}
