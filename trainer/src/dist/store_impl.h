// The c10d side of a RankStore, for the files of dist/ that make process groups.
#pragma once

#include "dist/backends.h"
#include "dist/store.h"

namespace topk_sft {

struct RankStore::Impl {
  StorePtr main;   // of the thread that trains
  StorePtr beats;  // a connection of its own: requests on one wait for each other
};

}  // namespace topk_sft
