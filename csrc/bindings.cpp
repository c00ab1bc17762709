// The only file with Python headers. Addresses arrive as integers that zps/native has checked;
// whatever touches bulk data or waits releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "codec/encoding.h"
#include "core/dispatch.h"
#include "core/engine.h"
#include "core/job.h"
#include "core/lane.h"
#include "core/pool.h"
#include "core/seqlock.h"
#include "core/words.h"
#include "optim/facts.h"

namespace py = pybind11;

namespace zps {
namespace {

using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

/// The kernels of one of `isas`, by its place there.
const Kernels& kernels_of(std::size_t isa) { return *targets().at(isa).kernels; }

std::vector<float*> float_pointers(const std::vector<Address>& addresses) {
  std::vector<float*> pointers;
  for (const Address address : addresses) pointers.push_back(at<float>(address));
  return pointers;
}

/// Where a C-contiguous array lies. Python objects come no further than this.
Address address_of(const py::handle& array) {
  Py_buffer view;
  if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  const auto address = reinterpret_cast<Address>(view.buf);
  PyBuffer_Release(&view);
  return address;
}

void bind_engine(py::module_& m) {
  py::class_<Pool>(m, "Pool")
      .def(py::init<unsigned>())
      .def_property_readonly("threads", &Pool::threads)
      .def_property_readonly("forked", &Pool::forked);

  py::class_<Job>(m, "Job")
      .def(py::init([](int rule, int dtype, std::uint32_t hyper_count, Address segments,
                       Address codecs, Address encoded, std::size_t segment_count, Address weights,
                       Address master, Address seq) {
        return new Job(static_cast<Rule>(rule), static_cast<Dtype>(dtype), hyper_count,
                       at<const Place>(segments), at<const Codec>(codecs),
                       at<const std::uint64_t>(encoded), segment_count, weights, master, seq);
      }))
      .def("set_round",
           [](Job& job, std::vector<Address> states, std::vector<Address> slots,
              std::vector<float> scales, float divisor, Address hypers, Address steps, float coef,
              double lr_factor, float dc_lambda, Address base) {
             job.set_round({std::move(states), std::move(slots), std::move(scales), divisor,
                            at<const double>(hypers), at<const std::int64_t>(steps), coef,
                            lr_factor, dc_lambda, base});
           });

  m.def("apply",
        [](Pool& pool, const Jobs& jobs, std::size_t isa) {
          apply(pool, kernels_of(isa), jobs);
        },
        NoGil());
  m.def("reduce",
        [](Pool& pool, const Jobs& jobs, const std::vector<Address>& outs, std::size_t isa) {
          reduce(pool, kernels_of(isa), jobs, float_pointers(outs));
        },
        NoGil());
  m.def("norm_sq",
        [](Pool& pool, const Jobs& jobs, std::size_t isa) {
          return norm_sq(pool, kernels_of(isa), jobs);
        },
        NoGil());
  m.def("copy",
        [](Address source, Address out, std::uint64_t n, int dtype, std::size_t isa) {
          return kernels_of(isa).copy(at<const void>(source), at<void>(out), n,
                                      static_cast<Dtype>(dtype));
        },
        NoGil());
}

void bind_lane(py::module_& m) {
  using Members = std::vector<std::pair<Address, Address>>;              // bell, done
  using Steps = std::vector<std::tuple<Address, Address, std::size_t>>;  // now, next, how many

  py::class_<Lane>(m, "Lane")
      .def(py::init([](Pool& pool, std::size_t isa, const Jobs& jobs, const Steps& steps,
                       const Members& members, Address closed, Address signal, bool divides) {
             std::vector<Lane::Member> who;
             for (const auto& [bell, done] : members) {
               who.push_back({at<const Bell>(bell), at<Word64>(done)});
             }
             std::vector<Lane::Bucket> buckets;
             for (std::size_t i = 0; i < jobs.size(); ++i) {
               const auto& [now, next, count] = steps.at(i);
               buckets.push_back({jobs[i], at<std::int64_t>(now), at<std::int64_t>(next), count});
             }
             return new Lane(pool, kernels_of(isa), std::move(who), std::move(buckets),
                             at<Word64>(closed), at<Word32>(signal), divides);
           }),
           py::keep_alive<1, 2>(), py::keep_alive<1, 4>())
      .def("run",
           [](Lane& lane, std::uint64_t round, const std::vector<std::uint64_t>& heard, int doorway,
              const std::vector<int>& elsewhere, std::int64_t timeout_ns) {
             lane.run(round, heard, doorway, elsewhere, timeout_ns);
           },
           NoGil())
      .def_property_readonly("heard",
                             [](const Lane& lane) {
                               std::vector<std::uint64_t> heard;
                               for (const auto& member : lane.members()) heard.push_back(member.heard);
                               return heard;
                             })
      .def_property_readonly("times", [](const Lane& lane) {
        std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>> times;
        for (const auto& [begin, applied, end] : lane.times()) {
          times.emplace_back(begin, applied, end);
        }
        return times;
      });
}

void bind_codecs(py::module_& m) {
  py::class_<Encoding>(m, "Encoding")
      .def(py::init([](Address codec, std::uint64_t n, std::uint64_t itemsize) {
        return encoding_of(*at<const Codec>(codec), n, itemsize);
      }))
      .def_readonly("nbytes", &Encoding::nbytes)
      .def_readonly("k", &Encoding::k);

  m.def("encode",
        [](const Encoding& encoding, int dtype, Address source, Address sent, Address residual_in,
           Address residual_out, float residual_factor, std::uint64_t seed, Address out,
           std::size_t isa) {
          return encode(kernels_of(isa),
                        {encoding, static_cast<Dtype>(dtype), at<const void>(source),
                         at<void>(sent), at<const float>(residual_in), at<float>(residual_out),
                         residual_factor, seed, at<std::uint8_t>(out), nullptr});
        },
        NoGil());
  m.def("decode",
        [](const Encoding& encoding, Address bytes, Address out, int dtype, bool add,
           std::size_t isa) {
          decode(kernels_of(isa), {encoding, at<const std::uint8_t>(bytes), at<void>(out),
                                   static_cast<Dtype>(dtype), add});
        },
        NoGil());
  m.def("check",
        [](const Encoding& encoding, Address bytes) {
          return check(encoding, at<const void>(bytes));
        },
        NoGil());
}

using Widths = std::vector<std::pair<Address, std::size_t>>;

int fill(const Widths& widths, Moves::Stream* streams) {
  if (widths.size() > Moves::kMost) throw std::invalid_argument("too many streams");
  for (const auto& [address, unit] : widths) *streams++ = {at<std::uint8_t>(address), unit};
  return static_cast<int>(widths.size());
}

void bind_roofline(py::module_& m) {
  m.def("stream",
        [](Pool& pool, const std::vector<Address>& reads, const std::vector<Address>& writes,
           std::uint64_t n, std::size_t block, std::size_t isa) {
          if (reads.size() > Streams::kMost || writes.size() > Streams::kMost) {
            throw std::invalid_argument("too many streams");
          }
          Streams streams{};
          streams.read_count = static_cast<int>(reads.size());
          streams.write_count = static_cast<int>(writes.size());
          streams.block = block;
          std::transform(reads.begin(), reads.end(), streams.reads, at<const float>);
          std::transform(writes.begin(), writes.end(), streams.writes, at<float>);
          stream(pool, kernels_of(isa), streams, n);
        },
        NoGil());
  m.def("move",
        [](Pool& pool, const Widths& reads, const Widths& writes, std::uint64_t units,
           std::size_t isa) {
          Moves moves{};
          moves.read_count = fill(reads, moves.reads);
          moves.write_count = fill(writes, moves.writes);
          move(pool, kernels_of(isa), moves, units);
        },
        NoGil());
}

void bind_words(py::module_& m) {
  m.def("address", &address_of);
  m.def("wait",
        [](Address signal, Address words, Address index, Address targets, std::size_t count,
           Address mail, std::uint32_t mail_seen, std::int64_t spin_ns, std::int64_t timeout_ns) {
          const Wish wish = {at<const Word64>(words), at<const std::uint32_t>(index),
                             at<const std::uint64_t>(targets), count, at<const Word32>(mail),
                             mail_seen};
          return static_cast<int>(wait(*at<const Word32>(signal), wish, spin_ns, timeout_ns));
        },
        NoGil());
  m.def("post", [](Address signal, Address words, Address index, Address values,
                   std::size_t count) {
    post(*at<Word32>(signal), at<Word64>(words), at<const std::uint32_t>(index),
         at<const std::uint64_t>(values), count);
  });
  m.def("pull",
        [](Address seq, Address source, Address out, std::size_t bytes, std::uint64_t tries) {
          return seq_read(*at<const Word64>(seq), at<const void>(source), at<void>(out), bytes,
                          tries);
        },
        NoGil());
  // acquire and release: words written here are read by another process's load, wait or pull.
  m.def("load_u64",
        [](Address word) { return at<const Word64>(word)->load(std::memory_order_acquire); });
  m.def("store_u64", [](Address word, std::uint64_t value) {
    at<Word64>(word)->store(value, std::memory_order_release);
  });
  m.def("load_u32",
        [](Address word) { return at<const Word32>(word)->load(std::memory_order_acquire); });
  m.def("store_u32", [](Address word, std::uint32_t value) {
    at<Word32>(word)->store(value, std::memory_order_release);
  });
  m.def("add_u32", [](Address word, std::uint32_t value) {
    return at<Word32>(word)->fetch_add(value, std::memory_order_acq_rel) + value;
  });
}

void bind_facts(py::module_& m) {
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Target& target : targets()) names.emplace_back(target.name);
    return names;
  });
  m.def("states_used", [](int rule, Address hyper) {
    return states_used(static_cast<Rule>(rule), at<const double>(hyper));
  });
  py::list rules;
  for (const RuleFacts& facts : rule_facts()) {
    rules.append(
        py::make_tuple(facts.name, static_cast<int>(facts.rule), facts.hypers, facts.states));
  }
  m.attr("RULES") = py::tuple(rules);
  m.attr("TILE") = kTile;
}

}  // namespace
}  // namespace zps

PYBIND11_MODULE(_core, m) {
  zps::bind_engine(m);
  zps::bind_lane(m);
  zps::bind_codecs(m);
  zps::bind_roofline(m);
  zps::bind_words(m);
  zps::bind_facts(m);
}
