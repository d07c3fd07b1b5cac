// Training forward: selection, and attention over the selected keys, one block of query rows at a time.
//
// Cost: half a dense forward for the scores, one filtering pass over them, and work in proportion to the kept
// pairs for everything after. Memory beyond the outputs: the packed copy of K and one block of scores per
// worker.

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

template <typename T>
void forward_block(const ForwardParams& p, const PackedKeys<T>& keys, const Blocks& blocks,
                   const Block& block, BlockScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const Problem& problem = p.problem;
  const Sequence& seq = problem.sequences[block.sequence];
  const int64_t group = blocks.group;
  score_block<T>(problem, p.q, keys, blocks, block, scratch);
  const auto v_row = [&](int32_t j) { return at<T>(p.v, seq.batch, seq.k_begin + j, block.kv_head); };

  for (int64_t t = 0; t < block.tokens; ++t) {
    const int64_t token = block.token + t;
    const Span seen = visible(token, seq.tq, seq.tk, problem.causal, seq.leftpad);
    const RowPlan plan = plan_row(seen, problem.budget, problem.sink, problem.recent);
    const A* scores = scratch.scores.data() + t * group * scratch.stride;
    Encoding<A> encoding;
    if (problem.kv_group) {
      group_maximum(scores, scratch.stride, group, seen, scratch.row.group.data());
      encoding = keep_row(scratch.row.group.data(), plan, scratch.row);
    }
    for (int64_t g = 0; g < group; ++g) {
      const A* mine = scores + g * scratch.stride;
      const int64_t head = block.kv_head * group + g;
      const int64_t row = problem.rows.at(seq.batch, head, seq.q_begin + token);
      if (!problem.kv_group) encoding = keep_row(mine, plan, scratch.row);
      write_selection(p, row, encoding, plan.kept, scratch.row.kept.data());
      if (!p.attend) continue;
      static_cast<A*>(p.lse)[row] =
          attend_row<T>(mine, plan.kept, static_cast<A>(problem.softmax_scale), v_row, problem.v_dim,
                        scratch.row, at_mutable<T>(p.out, seq.batch, seq.q_begin + token, head));
      if (p.kept_prob != nullptr) {
        memcpy(static_cast<A*>(p.kept_prob) + row * p.kept_width, scratch.row.weights.data(),
               plan.kept * sizeof(A));
      }
    }
  }
}

template <typename T>
void forward(const ForwardParams& p, const Executor& executor) {
  const Blocks blocks = make_blocks<acc_t<T>>(p.problem);
  const PackedKeys<T> keys(p.problem, p.k, executor);
  PerWorker<BlockScratch<acc_t<T>>> workers(executor.workers);
  const int64_t count = static_cast<int64_t>(blocks.list.size());
  auto body = [&](int64_t task, int64_t worker) {
    // The longest blocks first: causal rows late in a sequence see the most keys.
    const Block& block = blocks.list[count - 1 - task];
    forward_block<T>(p, keys, blocks, block,
                     workers.get(worker, blocks, p.problem.head_dim, p.problem.v_dim));
  };
  parallel(executor, count, body);
}
