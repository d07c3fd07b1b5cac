// The certified scan: the exact selection of a few query rows, from int8 codes of the keys (codes.h).
//
// 1. bound: int8 scores of a sample of the keys give, for each row, a value that the lower bounds of more
//    than W keys will very likely reach.
// 2. scan: int8 products of all codes with two int8 planes of the queries (mma.m16n8k32.s8, exact integer
//    sums) give a lower and an upper bound of every score; keys whose upper bound reaches the value are
//    listed.
// 3. finish, a row by a team of thread blocks: L = the W-th largest lower bound. Keys whose upper bound is
//    below L are provably outside the first W; the others, the survivors, are scored by the contract's
//    routine, and the first W of them are selected exactly. That W lower bounds reach the value of step 1 and
//    that nothing overflowed is counted: otherwise the row is scored and selected exactly, by the next
//    launch.
// The set is that of the exact scan, always. docs/decode.md derives the bounds.
//
// Cost at D = 128: 132 bytes a key and KV head, 8 a listed key, one key row a survivor; the fallback reads
// all keys once for each row.
#pragma once

#include <string>

#include "codes.h"

namespace topk_attn::cuda::decode {

inline constexpr int kCertifiedRows = 8;  // query rows of a KV head at most

// A query row between the steps.
struct alignas(32) CertifiedRow {
  float scale;    // of the planes
  float norm;     // of the row times 2^exponent, rounded up
  float bound;    // of step 1; NaN: every key is listed
  int32_t begin;  // keys that compete
  int32_t end;
  int32_t kept;
  int32_t seen_begin;  // all visible keys
  int32_t seen_end;
};

// Pieces of one workspace.
struct CertifiedScratch {
  int8_t* queries = nullptr;     // (slab pairs, 16, width): column 2 m and 2 m + 1 are the planes of row m
  CertifiedRow* rows = nullptr;  // (slab pairs, 8)
  unsigned long long* lists = nullptr;  // (slab rows, room)
  int32_t* counts = nullptr;            // (slab rows): listed keys, also those that did not fit
  size_t bytes = 0;                     // of all pieces
  int32_t room = 0;                     // entries of a list
  int32_t team = 1;                     // blocks of a row in step 3
  int32_t chunk = 0;                    // keys of a warp's piece of step 2
};

// What run() takes to serve a call by the certified scan; the scratch is that of the call's largest slab.
struct CertifiedRun {
  KeyCodes codes;
  CertifiedScratch scratch;
};

// Why the certified scan cannot serve the call (in slabs like `slab`) on a device of this compute capability
// (10 * major + minor); empty: it can.
std::string no_certified(const DecodeCall& call, const Slab& slab, int arch);

size_t certified_bytes(const DecodeCall& call, const Slab& largest_slab, int sms);
CertifiedScratch certified_scratch(const DecodeCall& call, const Slab& largest_slab, void* workspace,
                                   int sms);

// Takes the place of scan() and select(): leaves the slab's encodings and lists behind, and in scratch.scores
// the exact scores of all kept keys (what else is there is undefined); adds to codes.stats. A
// certified_scratch.room below that of certified_scratch() forces overflows, for tests.
cudaError_t certified(const DecodeCall& call, const Slab& slab, const Scratch& scratch, const KeyCodes& codes,
                      const CertifiedScratch& certified_scratch, int sms, cudaStream_t stream);

}  // namespace topk_attn::cuda::decode
