// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the random number of a seed and a position,
// to the bit that of sampling/rng.py. There is nothing to keep, so a row's number doesn't depend on what was drawn before or beside it.
#pragma once

#include <cstdint>

namespace minfer {
namespace MINFER_ISA {

// In [0, 1), a multiple of 2^-53. The key is the seed's two words, the counter the position and, from its third word on, 0.
inline double philox_uniform(uint32_t key_low, uint32_t key_high, uint64_t position) {
  uint32_t words[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * words[0], third = uint64_t{0xCD9E8D57} * words[2];
    words[0] = static_cast<uint32_t>(third >> 32) ^ words[1] ^ key_low;
    words[2] = static_cast<uint32_t>(first >> 32) ^ words[3] ^ key_high;
    words[1] = static_cast<uint32_t>(third);
    words[3] = static_cast<uint32_t>(first);
    key_low += 0x9E3779B9, key_high += 0xBB67AE85;
  }
  return static_cast<double>((uint64_t{words[0]} << 21) ^ (words[1] >> 11)) * 0x1p-53;
}

}  // namespace MINFER_ISA
}  // namespace minfer
