// Spreads the tiles of jobs over a pool. Results do not depend on the number of threads.
#pragma once

#include <vector>

#include "core/job.h"
#include "core/pool.h"
#include "kernels.h"

namespace zps {

using Jobs = std::vector<Job*>;

/// Averages the contributions of every job and applies its rule. A job's seq word is odd from its
/// first write to its last, then one version higher; parameters at step 0 are left as they are.
void apply(Pool& pool, const Kernels& kernels, const Jobs& jobs);

/// outs[j][i] = averaged gradient of element i of job j; parameters at step 0 are left out.
void reduce(Pool& pool, const Kernels& kernels, const Jobs& jobs, const std::vector<float*>& outs);

/// Sum of squares of the averaged gradients of all jobs; parameters at step 0 count nothing.
double norm_sq(Pool& pool, const Kernels& kernels, const Jobs& jobs);

/// The roofline that apply is measured against: n elements of every stream, spread as apply does.
/// Throws std::invalid_argument for a mix or block that was not compiled.
void stream(Pool& pool, const Kernels& kernels, const Streams& streams, std::uint64_t n);

/// The roofline of codecs: so many units of every stream.
void move(Pool& pool, const Kernels& kernels, const Moves& moves, std::uint64_t units);

/// Encodes one piece on the calling thread; fills in the call's scratch. See Kernels::encode.
double encode(const Kernels& kernels, EncodeCall call);

/// Decodes one piece on the calling thread.
void decode(const Kernels& kernels, const DecodeCall& call);

}  // namespace zps
