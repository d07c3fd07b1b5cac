// One include for both majors of Catch2: 3 (catch_all.hpp) or 2 (catch.hpp), with Approx under one name.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
#else
#include <catch2/catch.hpp>
#endif
