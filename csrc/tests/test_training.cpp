// A training step of a block, forward and backward: pw_stats, bn_act, act_pw_residual, patch_conv's and pconv3x3's
// gradients, against plain loops.
#include "testing.h"

namespace {

using namespace testing;

// ---- The same in plain loops of Real --------------------------------------------------------------------------------

template <class Real>
using Values = std::vector<Real>;

size_t at(int64_t i) { return static_cast<size_t>(i); }

// Gradients of y = conv(x), stride and padding as in the operators: those of x and of the weight.
template <class Real>
void conv_gradients(const Values<Real>& dy, const Values<Real>& x, const Shape& s, const Values<Real>& weight,
                    int64_t c_out, int64_t kh, int64_t kw, int64_t stride_h, int64_t stride_w, int64_t pad,
                    Values<Real>* dx, Values<Real>* dw) {
  dx->assign(x.size(), 0);
  dw->assign(weight.size(), 0);
  const int64_t out_height = (s.height + 2 * pad - kh) / stride_h + 1;
  const int64_t out_width = (s.width + 2 * pad - kw) / stride_w + 1;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t oh = 0; oh < out_height; ++oh) {
      for (int64_t ow = 0; ow < out_width; ++ow) {
        for (int64_t n = 0; n < c_out; ++n) {
          const Real g = dy[at(((b * out_height + oh) * out_width + ow) * c_out + n)];
          for (int64_t i = 0; i < kh; ++i) {
            for (int64_t j = 0; j < kw; ++j) {
              const int64_t h = oh * stride_h + i - pad, w = ow * stride_w + j - pad;
              if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
              for (int64_t c = 0; c < s.channels; ++c) {
                const size_t from = at(((b * s.height + h) * s.width + w) * s.channels + c);
                const size_t tap = at(((n * s.channels + c) * kh + i) * kw + j);
                (*dx)[from] += g * weight[tap];
                (*dw)[tap] += g * x[from];
              }
            }
          }
        }
      }
    }
  }
}

template <class Real>
Real act_slope(Act act, Real x) {
  switch (act) {
    case Act::kIdentity:
      return 1;
    case Act::kRelu:
      return x <= 0 ? Real(0) : Real(1);
    case Act::kGelu:
      return Real(0.5) * (1 + std::erf(x * Real(0.70710678118654752440))) +
             x * std::exp(Real(-0.5) * x * x) * Real(0.39894228040143267794);
    case Act::kGeluTanh: {
      const Real k = Real(0.79788456080286535588), t = std::tanh(k * (x + Real(0.044715) * x * x * x));
      return Real(0.5) * (1 + t) + Real(0.5) * x * (1 - t * t) * k * (1 + Real(3 * 0.044715) * x * x);
    }
    case Act::kSilu: {
      const Real s = 1 / (1 + std::exp(-x));
      return s * (1 + x * (1 - s));
    }
    case Act::kHardswish:
      return x < -3 ? Real(0) : x <= 3 ? x / 3 + Real(0.5) : Real(1);
  }
  return 0;
}

// A dense array as a tensor of one row, for the criterion.
template <class T>
Tensor<T> row(int64_t size) {
  return Tensor<T>({1, 1, 1, size});
}
template <class T>
Tensor<T> random_row(uint32_t seed, int64_t size, double scale, double offset = 0) {
  Tensor<T> t = row<T>(size);
  t.fill(seed, scale);
  for (int64_t i = 0; i < size; ++i) t.at(0, 0, 0, i) = round_to<T>(to_double(t.at(0, 0, 0, i)) + offset);
  return t;
}

// Runs `operation(parallel)`, which returns its results' bytes, on threads of several numbers: the bits must not move.
template <class Operation>
void check_threads(const std::string& name, const Operation& operation) {
  const std::vector<unsigned char> first = operation(fasternet::serial());
  Threads two(2), five(5);
  Reversed reversed(40), backwards(257);
  AtOnce at_once(4);
  check(operation(two.parallel()) == first, name, "other bits with 2 threads");
  check(operation(five.parallel()) == first, name, "other bits with 5 threads");
  check(operation(reversed.parallel()) == first, name, "other bits with 40 threads, reversed");
  check(operation(backwards.parallel()) == first, name, "other bits with 257 threads, reversed");
  check(operation(at_once.parallel()) == first, name, "other bits with 4 threads that are one");
  check(operation(fasternet::serial()) == first, name, "other bits in a second run");
}
template <class T>
void append(std::vector<unsigned char>* bytes, const Tensor<T>& t) {
  const auto values = t.template dense<double>();
  const auto* data = reinterpret_cast<const unsigned char*>(values.data());
  bytes->insert(bytes->end(), data, data + values.size() * sizeof(double));
}

// ---- A block --------------------------------------------------------------------------------------------------------

struct Case {
  Shape shape;
  int64_t c_partial, c_hidden;
  Act act = Act::kRelu;
  bool with_layer_scale = false, with_sample_scale = false, with_dy = true;
  Slice slice = {};
};

template <class T>
struct Block {
  explicit Block(const Case& c)
      : c(c),
        hidden{c.shape.batch, c.shape.height, c.shape.width, c.c_hidden},
        partial(Filter<T>::random(2, c.c_partial, c.c_partial, 3, 3, false, false)),
        partial_last(partial.reordered()),
        pw1(Filter<T>::random(3, c.c_hidden, c.shape.channels, 1, 1, false, false)),
        pw2(Filter<T>::random(4, c.shape.channels, c.c_hidden, 1, 1, false, false)),
        x(c.shape, Layout::kChannelsLast, c.slice),
        grad(c.shape, Layout::kChannelsLast, c.slice),
        z(hidden),
        dz(hidden),
        mean(random_row<Compute<T>>(5, c.c_hidden, 0.5)),
        scale(random_row<Compute<T>>(6, c.c_hidden, 0.3, 1)),
        shift(random_row<Compute<T>>(7, c.c_hidden, 0.5)),
        dmean(random_row<Compute<T>>(8, c.c_hidden, 1)),
        dm2(random_row<Compute<T>>(9, c.c_hidden, 0.1)),
        layer(random_row<Compute<T>>(10, c.shape.channels, 0.3, 1)),
        sample(random_row<Compute<T>>(11, std::max<int64_t>(c.shape.batch, 1), 0.3, 1)) {
    x.fill(12), grad.fill(13), z.fill(14), dz.fill(15);
    name = std::string(Storage<T>::kName) + " " + c.shape.str() + " c_partial " + std::to_string(c.c_partial) +
           " c_hidden " + std::to_string(c.c_hidden) + " " + act_name(c.act) +
           (c.with_layer_scale ? " layer_scale" : "") + (c.with_sample_scale ? " sample_scale" : "");
  }

  int64_t pixels() const { return c.shape.batch * c.shape.height * c.shape.width; }

  // ---- pw_stats
  void run_pw_stats(Tensor<T>* out, Tensor<Compute<T>>* m, Tensor<Compute<T>>* m2, const ParallelFor& parallel,
                    bool channels_last = false) const {
    fasternet::pw_stats(
        {Storage<T>::kDType, c.shape.batch, c.shape.channels, c.shape.height, c.shape.width, c.c_partial, c.c_hidden,
         x.data(), x.pixel_stride(), (channels_last ? partial_last : partial).weight.data(), pw1.weight.data(),
         out->data(), m->data(), m2->data(), channels_last},
        parallel);
  }
  void test_pw_stats() const {
    Tensor<T> out(hidden);
    Tensor<Compute<T>> m = row<Compute<T>>(c.c_hidden), m2 = row<Compute<T>>(c.c_hidden);
    run_pw_stats(&out, &m, &m2, fasternet::serial());
    check_close("pw_stats z " + name, out, z_of<Exact>(), z_of<Plain<Compute<T>>>());
    if (pixels() > 0) {
      check_close("pw_stats mean " + name, m, statistics<double>(out).first, statistics<Compute<T>>(out).first);
      check_close("pw_stats m2 " + name, m2, statistics<double>(out).second, statistics<Compute<T>>(out).second);
    }
    check_threads("pw_stats " + name, [&](const ParallelFor& parallel) {
      Tensor<T> again(hidden);
      Tensor<Compute<T>> again_m = row<Compute<T>>(c.c_hidden), again_m2 = row<Compute<T>>(c.c_hidden);
      run_pw_stats(&again, &again_m, &again_m2, parallel);
      std::vector<unsigned char> bytes;
      append(&bytes, again), append(&bytes, again_m), append(&bytes, again_m2);
      return bytes;
    });
  }
  template <class Arithmetic>
  auto z_of() const {
    using Real = typename Arithmetic::Real;
    const auto u = partial_conv<Arithmetic>(x.template dense<Real>(), c.shape, partial);
    return conv_shift_act<Arithmetic>(u, c.shape, pw1, Act::kIdentity);
  }
  template <class Real>
  std::pair<Values<Real>, Values<Real>> statistics(const Tensor<T>& of) const {
    const auto values = of.template dense<Real>();
    Values<Real> m(at(c.c_hidden), 0), m2(at(c.c_hidden), 0);
    for (size_t i = 0; i < values.size(); ++i) m[i % at(c.c_hidden)] += values[i];
    for (Real& value : m) value /= static_cast<Real>(pixels());
    for (size_t i = 0; i < values.size(); ++i) {
      const Real d = values[i] - m[i % at(c.c_hidden)];
      m2[i % at(c.c_hidden)] += d * d;
    }
    return {m, m2};
  }

  // ---- act_pw_residual, bn_act
  template <class Arithmetic, class Real = typename Arithmetic::Real>
  Values<Real> a_of() const {
    Values<Real> a = z.template dense<Real>();
    for (size_t i = 0; i < a.size(); ++i) a[i] = Arithmetic::act(c.act, t_of<Real>(a[i], i));
    return a;
  }
  template <class Real>
  Real t_of(Real value, size_t i) const {
    const int64_t h = static_cast<int64_t>(i) % c.c_hidden;
    return (value - static_cast<Real>(mean.at(0, 0, 0, h))) * static_cast<Real>(scale.at(0, 0, 0, h)) +
           static_cast<Real>(shift.at(0, 0, 0, h));
  }
  template <class Real>
  Real sample_of(size_t i) const {
    const int64_t image = c.shape.height * c.shape.width * c.shape.channels;
    return c.with_sample_scale ? static_cast<Real>(sample.at(0, 0, 0, static_cast<int64_t>(i) / image)) : Real(1);
  }
  template <class Real>
  Real layer_of(size_t i) const {
    return c.with_layer_scale ? static_cast<Real>(layer.at(0, 0, 0, static_cast<int64_t>(i) % c.shape.channels))
                              : Real(1);
  }
  template <class Arithmetic, class Real = typename Arithmetic::Real>
  Values<Real> y_of() const {
    Values<Real> y = conv_shift_act<Arithmetic>(a_of<Arithmetic>(), hidden, pw2, Act::kIdentity);
    const auto residual = x.template dense<Real>();
    for (size_t i = 0; i < y.size(); ++i) y[i] = residual[i] + sample_of<Real>(i) * (layer_of<Real>(i) * y[i]);
    return y;
  }
  void run_forward(Tensor<T>* y, Tensor<T>* a, const ParallelFor& parallel) const {
    const DType dtype = Storage<T>::kDType;
    fasternet::act_pw_residual(
        {dtype, dtype, c.shape.batch, c.shape.channels, c.shape.height, c.shape.width, c.c_hidden, x.data(),
         x.pixel_stride(), z.data(), z.pixel_stride(), mean.data(), scale.data(), shift.data(), pw2.weight.data(),
         c.with_layer_scale ? layer.data() : nullptr, c.with_sample_scale ? sample.data() : nullptr, c.act, y->data()},
        parallel);
    fasternet::bn_act({dtype, pixels(), c.c_hidden, z.data(), z.pixel_stride(), mean.data(), scale.data(), shift.data(),
                       c.act, a->data()},
                      parallel);
  }
  void test_forward() const {
    Tensor<T> y(c.shape), a(hidden);
    run_forward(&y, &a, fasternet::serial());
    check_close("act_pw_residual " + name, y, y_of<Exact>(), y_of<Plain<Compute<T>>>());
    check_close("bn_act " + name, a, a_of<Exact>(), a_of<Plain<Compute<T>>>());
    check_threads("act_pw_residual " + name, [&](const ParallelFor& parallel) {
      Tensor<T> again(c.shape), again_a(hidden);
      run_forward(&again, &again_a, parallel);
      std::vector<unsigned char> bytes;
      append(&bytes, again), append(&bytes, again_a);
      return bytes;
    });
  }

  // ---- act_pw_residual_backward
  template <class Real>
  struct ActGradients {
    Values<Real> dz, dmean, dscale, dshift, dw, dlayer, dsample;
  };
  template <class Arithmetic, class Real = typename Arithmetic::Real>
  ActGradients<Real> act_gradients() const {
    ActGradients<Real> g;
    const auto incoming = grad.template dense<Real>();
    const auto a = a_of<Arithmetic>();
    const auto branch = conv_shift_act<Arithmetic>(a, hidden, pw2, Act::kIdentity);
    Values<Real> scaled = incoming, da;
    g.dlayer.assign(at(c.shape.channels), 0);
    g.dsample.assign(at(std::max<int64_t>(c.shape.batch, 1)), 0);
    const size_t image = at(c.shape.height * c.shape.width * c.shape.channels);
    for (size_t i = 0; i < scaled.size(); ++i) {
      g.dsample[i / image] += incoming[i] * layer_of<Real>(i) * branch[i];
      scaled[i] *= sample_of<Real>(i);
      g.dlayer[i % at(c.shape.channels)] += scaled[i] * branch[i];
      scaled[i] *= layer_of<Real>(i);
    }
    conv_gradients<Real>(scaled, a, hidden, pw2.template folded<Real>(), c.shape.channels, 1, 1, 1, 1, 0, &da, &g.dw);
    const auto values = z.template dense<Real>();
    for (Values<Real>* v : {&g.dmean, &g.dscale, &g.dshift}) v->assign(at(c.c_hidden), 0);
    g.dz = da;
    for (size_t i = 0; i < da.size(); ++i) {
      const size_t h = i % at(c.c_hidden);
      const Real s = static_cast<Real>(scale.at(0, 0, 0, static_cast<int64_t>(h)));
      const Real dt = act_slope<Real>(c.act, t_of<Real>(values[i], i)) * da[i];
      g.dz[i] = dt * s;
      g.dshift[h] += dt;
      g.dscale[h] += dt * (values[i] - static_cast<Real>(mean.at(0, 0, 0, static_cast<int64_t>(h))));
      g.dmean[h] -= dt * s;
    }
    return g;
  }
  struct ActResults {
    Tensor<T> dz, dw;
    Tensor<Compute<T>> dmean, dscale, dshift, dlayer, dsample;
    explicit ActResults(const Block& b)
        : dz(b.hidden),
          dw(row<T>(b.c.shape.channels * b.c.c_hidden)),
          dmean(row<Compute<T>>(b.c.c_hidden)),
          dscale(dmean),
          dshift(dmean),
          dlayer(row<Compute<T>>(b.c.shape.channels)),
          dsample(row<Compute<T>>(std::max<int64_t>(b.c.shape.batch, 1))) {}
  };
  // wanted: a bit for each gradient, in the order of the struct.
  void run_act_backward(ActResults* r, unsigned wanted, const ParallelFor& parallel) const {
    fasternet::ActPwResidualBackward args = {};
    args.dtype = Storage<T>::kDType;
    args.batch = c.shape.batch, args.channels = c.shape.channels;
    args.height = c.shape.height, args.width = c.shape.width, args.c_hidden = c.c_hidden;
    args.grad = grad.data(), args.grad_pixel_stride = grad.pixel_stride();
    args.z = z.data(), args.z_pixel_stride = z.pixel_stride();
    args.mean = mean.data(), args.scale = scale.data(), args.shift = shift.data();
    args.w_pw2 = pw2.weight.data();
    args.layer_scale = c.with_layer_scale ? layer.data() : nullptr;
    args.sample_scale = c.with_sample_scale ? sample.data() : nullptr;
    args.act = c.act;
    args.dz = wanted & 1 ? r->dz.data() : nullptr;
    args.dmean = wanted & 2 ? r->dmean.data() : nullptr;
    args.dscale = wanted & 4 ? r->dscale.data() : nullptr;
    args.dshift = wanted & 8 ? r->dshift.data() : nullptr;
    args.dw_pw2 = wanted & 16 ? r->dw.data() : nullptr;
    args.dlayer_scale = wanted & 32 && c.with_layer_scale ? r->dlayer.data() : nullptr;
    args.dsample_scale = wanted & 64 && c.with_sample_scale ? r->dsample.data() : nullptr;
    fasternet::act_pw_residual_backward(args, parallel);
  }
  void test_act_backward() const {
    const auto exact = act_gradients<Exact>();
    const auto plain = act_gradients<Plain<Compute<T>>>();
    const std::string of = " of act_pw_residual " + name;
    for (unsigned wanted : {127u, 1u, 2u, 8u, 16u, 32u, 64u}) {
      ActResults r(*this);
      run_act_backward(&r, wanted, fasternet::serial());
      if (wanted & 1) check_close("dz" + of, r.dz, exact.dz, plain.dz);
      if (wanted & 2) check_close("dmean" + of, r.dmean, exact.dmean, plain.dmean);
      if (wanted & 4) check_close("dscale" + of, r.dscale, exact.dscale, plain.dscale);
      if (wanted & 8) check_close("dshift" + of, r.dshift, exact.dshift, plain.dshift);
      if (wanted & 16) check_close("dw_pw2" + of, r.dw, exact.dw, plain.dw);
      if (wanted & 32 && c.with_layer_scale) check_close("dlayer" + of, r.dlayer, exact.dlayer, plain.dlayer);
      if (wanted & 64 && c.with_sample_scale && c.shape.batch > 0) {
        check_close("dsample" + of, r.dsample, exact.dsample, plain.dsample);
      }
    }
    check_threads("act_pw_residual_backward " + name, [&](const ParallelFor& parallel) {
      ActResults r(*this);
      run_act_backward(&r, 127, parallel);
      std::vector<unsigned char> bytes;
      append(&bytes, r.dz), append(&bytes, r.dw), append(&bytes, r.dmean), append(&bytes, r.dscale);
      append(&bytes, r.dshift), append(&bytes, r.dlayer), append(&bytes, r.dsample);
      return bytes;
    });
  }

  // ---- pw_stats_backward
  template <class Real>
  struct StatsGradients {
    Values<Real> dx, dw_partial, dw_pw;
  };
  template <class Arithmetic, class Real = typename Arithmetic::Real>
  StatsGradients<Real> stats_gradients() const {
    const auto values = z.template dense<Real>();
    Values<Real> total = dz.template dense<Real>(), du;
    for (size_t i = 0; i < total.size(); ++i) {
      const int64_t h = static_cast<int64_t>(i) % c.c_hidden;
      const Real centred = values[i] - static_cast<Real>(mean.at(0, 0, 0, h));
      total[i] += static_cast<Real>(dmean.at(0, 0, 0, h)) / static_cast<Real>(pixels()) +
                  2 * static_cast<Real>(dm2.at(0, 0, 0, h)) * centred;
    }
    StatsGradients<Real> g;
    const auto input = x.template dense<Real>();
    const auto u = partial_conv<Arithmetic>(input, c.shape, partial);
    conv_gradients<Real>(total, u, c.shape, pw1.template folded<Real>(), c.c_hidden, 1, 1, 1, 1, 0, &du, &g.dw_pw);
    g.dx = du;
    through_partial(du, input, &g.dx, &g.dw_partial);
    const auto added = grad.template dense<Real>();
    for (size_t i = 0; c.with_dy && i < g.dx.size(); ++i) g.dx[i] += added[i];
    return g;
  }
  // The first channels of dx, and the weight's gradient.
  template <class Real>
  void through_partial(const Values<Real>& du, const Values<Real>& input, Values<Real>* dx, Values<Real>* dw) const {
    Values<Real> first_du, first_x, first_dx;
    for (size_t i = 0; i < du.size(); ++i) {
      if (static_cast<int64_t>(i) % c.shape.channels >= c.c_partial) continue;
      first_du.push_back(du[i]);
      first_x.push_back(input[i]);
    }
    const Shape first{c.shape.batch, c.shape.height, c.shape.width, c.c_partial};
    conv_gradients<Real>(first_du, first_x, first, partial.template folded<Real>(), c.c_partial, 3, 3, 1, 1, 1,
                         &first_dx, dw);
    size_t next = 0;
    for (size_t i = 0; i < dx->size(); ++i) {
      if (static_cast<int64_t>(i) % c.shape.channels < c.c_partial) (*dx)[i] = first_dx[next++];
    }
  }
  struct StatsResults {
    Tensor<T> dx, dw_partial, dw_pw;
    explicit StatsResults(const Block& b)
        : dx(b.c.shape),
          dw_partial(row<T>(9 * b.c.c_partial * b.c.c_partial)),
          dw_pw(row<T>(b.c.shape.channels * b.c.c_hidden)) {}
  };
  void run_stats_backward(StatsResults* r, unsigned wanted, const ParallelFor& parallel,
                          bool channels_last = false) const {
    fasternet::PwStatsBackward args = {};
    args.dtype = Storage<T>::kDType;
    args.batch = c.shape.batch, args.channels = c.shape.channels;
    args.height = c.shape.height, args.width = c.shape.width;
    args.c_partial = c.c_partial, args.c_out = c.c_hidden;
    args.dz = dz.data(), args.dz_pixel_stride = dz.pixel_stride();
    args.dmean = dmean.data(), args.dm2 = dm2.data();
    args.x = x.data(), args.x_pixel_stride = x.pixel_stride();
    args.z = z.data(), args.z_pixel_stride = z.pixel_stride();
    args.mean = mean.data();
    args.w_partial = (channels_last ? partial_last : partial).weight.data(), args.w_pw = pw1.weight.data();
    args.w_partial_channels_last = channels_last;
    args.dy = c.with_dy ? grad.data() : nullptr, args.dy_pixel_stride = grad.pixel_stride();
    args.dx = wanted & 1 ? r->dx.data() : nullptr;
    args.dw_partial = wanted & 2 ? r->dw_partial.data() : nullptr;
    args.dw_pw = wanted & 4 ? r->dw_pw.data() : nullptr;
    fasternet::pw_stats_backward(args, parallel);
  }
  void test_stats_backward() const {
    const auto exact = stats_gradients<Exact>();
    const auto plain = stats_gradients<Plain<Compute<T>>>();
    const std::string of = " of pw_stats " + name;
    for (unsigned wanted : {7u, 1u, 2u, 4u}) {
      StatsResults r(*this);
      run_stats_backward(&r, wanted, fasternet::serial());
      if (wanted & 1) check_close("dx" + of, r.dx, exact.dx, plain.dx);
      if (wanted & 2) check_close("dw_partial" + of, r.dw_partial, exact.dw_partial, plain.dw_partial);
      if (wanted & 4) check_close("dw_pw" + of, r.dw_pw, exact.dw_pw, plain.dw_pw);
    }
    check_threads("pw_stats_backward " + name, [&](const ParallelFor& parallel) {
      StatsResults r(*this);
      run_stats_backward(&r, 7, parallel);
      std::vector<unsigned char> bytes;
      append(&bytes, r.dx), append(&bytes, r.dw_partial), append(&bytes, r.dw_pw);
      return bytes;
    });
  }

  // ---- pconv3x3_backward
  void run_pconv3x3_backward(Tensor<T>* dx, Tensor<T>* dw, bool channels_last) const {
    fasternet::pconv3x3_backward(
        {Storage<T>::kDType, c.shape.batch, c.shape.channels, c.shape.height, c.shape.width, c.c_partial, grad.data(),
         grad.pixel_stride(), x.data(), x.pixel_stride(), (channels_last ? partial_last : partial).weight.data(),
         dx->data(), dw->data(), channels_last},
        fasternet::serial());
  }
  void test_pconv3x3_backward() const {
    Tensor<T> dx(c.shape), dw = row<T>(9 * c.c_partial * c.c_partial);
    run_pconv3x3_backward(&dx, &dw, false);
    Values<double> exact_dx = grad.template dense<double>(), exact_dw;
    through_partial(grad.template dense<double>(), x.template dense<double>(), &exact_dx, &exact_dw);
    Values<Compute<T>> plain_dx = grad.template dense<Compute<T>>(), plain_dw;
    through_partial(grad.template dense<Compute<T>>(), x.template dense<Compute<T>>(), &plain_dx, &plain_dw);
    check_close("dx of pconv3x3 " + name, dx, exact_dx, plain_dx);
    check_close("dw of pconv3x3 " + name, dw, exact_dw, plain_dw);
  }

  // The same bits with w_partial in channels-last memory, its gradient in that order.
  void test_channels_last_weight() const {
    const auto same_weight_gradient = [&](const Tensor<T>& last, const Tensor<T>& plain) {
      return last.template dense<double>() == partial.to_channels_last(plain.template dense<double>());
    };
    Tensor<T> out(hidden), expected_out(hidden);
    Tensor<Compute<T>> m = row<Compute<T>>(c.c_hidden), m2 = m;
    run_pw_stats(&expected_out, &m, &m2, fasternet::serial());
    run_pw_stats(&out, &m, &m2, fasternet::serial(), true);
    check(out.same_bits(expected_out), "pw_stats " + name, "other bits with a channels-last weight");
    StatsResults r(*this), expected(*this);
    run_stats_backward(&expected, 7, fasternet::serial());
    run_stats_backward(&r, 7, fasternet::serial(), true);
    check(r.dx.same_bits(expected.dx) && r.dw_pw.same_bits(expected.dw_pw) &&
              same_weight_gradient(r.dw_partial, expected.dw_partial),
          "pw_stats_backward " + name, "other bits with a channels-last weight");
    Tensor<T> dx(c.shape), dw = row<T>(9 * c.c_partial * c.c_partial), expected_dx = dx, expected_dw = dw;
    run_pconv3x3_backward(&expected_dx, &expected_dw, false);
    run_pconv3x3_backward(&dx, &dw, true);
    check(dx.same_bits(expected_dx) && same_weight_gradient(dw, expected_dw), "pconv3x3_backward " + name,
          "other bits with a channels-last weight");
  }

  void test() const {
    const Tensor<T> x_before = x, z_before = z, dz_before = dz, grad_before = grad;
    test_pw_stats();
    test_forward();
    test_act_backward();
    test_stats_backward();
    test_pconv3x3_backward();
    test_channels_last_weight();
    check(x.same_bits(x_before) && z.same_bits(z_before) && dz.same_bits(dz_before) && grad.same_bits(grad_before),
          name, "an input changed");
  }

  Case c;
  Shape hidden;
  Filter<T> partial, partial_last, pw1, pw2;
  Tensor<T> x, grad, z, dz;
  Tensor<Compute<T>> mean, scale, shift, dmean, dm2, layer, sample;
  std::string name;
};

// ---- Patches --------------------------------------------------------------------------------------------------------

template <class T>
void test_patches(const Shape& shape, int64_t c_out, int64_t kh, int64_t kw, Layout layout, bool with_scale) {
  const std::string name = std::string("patch_conv_backward ") + Storage<T>::kName + " " + shape.str() + " to " +
                           std::to_string(c_out) + " by " + std::to_string(kh) + "x" + std::to_string(kw) +
                           (with_scale ? " scale" : "") + (layout == Layout::kChannelsFirst ? " channels first" : "");
  Tensor<T> x(shape, layout);
  x.fill(1);
  const Shape out{shape.batch, shape.height / kh, shape.width / kw, c_out};
  Tensor<T> grad(out, Layout::kChannelsLast, {1, c_out + 3});
  grad.fill(2);
  const auto filter = Filter<T>::random(3, c_out, shape.channels, kh, kw, with_scale, false);
  const auto last = filter.reordered();
  const auto run = [&](Tensor<T>* dx, Tensor<T>* dw, Tensor<Compute<T>>* dscale, Tensor<Compute<T>>* dshift,
                       const ParallelFor& parallel, bool channels_last = false) {
    fasternet::PatchConvBackward args = {};
    args.dtype = Storage<T>::kDType;
    args.batch = shape.batch, args.channels = shape.channels, args.height = shape.height, args.width = shape.width;
    args.c_out = c_out, args.kh = kh, args.kw = kw;
    args.grad = grad.data(), args.grad_pixel_stride = grad.pixel_stride();
    args.x = x.data();
    for (int d = 0; d < 4; ++d) args.x_stride[d] = x.stride()[d];
    args.weight = (channels_last ? last : filter).weight.data();
    args.weight_channels_last = channels_last;
    args.scale = with_scale ? filter.scale.data() : nullptr;
    args.dx = dx->data(), args.dweight = dw->data();
    args.dscale = with_scale ? dscale->data() : nullptr, args.dshift = dshift->data();
    fasternet::patch_conv_backward(args, parallel);
  };
  const auto expected = [&](auto arithmetic, auto* dx, auto* dw, auto* dscale, auto* dshift) {
    using Real = typename decltype(arithmetic)::Real;
    const auto input = x.template dense<Real>();
    auto g = grad.template dense<Real>();
    Filter<T> bare = filter;
    bare.scale.clear();
    const auto y = conv_shift_act<decltype(arithmetic)>(input, shape, bare, Act::kIdentity);
    dscale->assign(at(c_out), 0), dshift->assign(at(c_out), 0);
    for (size_t i = 0; i < g.size(); ++i) {
      (*dscale)[i % at(c_out)] += g[i] * y[i];
      (*dshift)[i % at(c_out)] += g[i];
      if (with_scale) g[i] *= static_cast<Real>(filter.scale[i % at(c_out)]);
    }
    conv_gradients<Real>(g, input, shape, bare.template folded<Real>(), c_out, kh, kw, kh, kw, 0, dx, dw);
  };
  Tensor<T> dx(shape), dw = row<T>(c_out * shape.channels * kh * kw);
  Tensor<Compute<T>> dscale = row<Compute<T>>(c_out), dshift = dscale;
  run(&dx, &dw, &dscale, &dshift, fasternet::serial());
  Values<double> exact[4];
  Values<Compute<T>> plain[4];
  expected(Exact{}, &exact[0], &exact[1], &exact[2], &exact[3]);
  expected(Plain<Compute<T>>{}, &plain[0], &plain[1], &plain[2], &plain[3]);
  check_close("dx of " + name, dx, exact[0], plain[0]);
  check_close("dw of " + name, dw, exact[1], plain[1]);
  if (with_scale) check_close("dscale of " + name, dscale, exact[2], plain[2]);
  check_close("dshift of " + name, dshift, exact[3], plain[3]);
  Tensor<T> last_dx(shape), last_dw = row<T>(c_out * shape.channels * kh * kw);
  Tensor<Compute<T>> last_dscale = row<Compute<T>>(c_out), last_dshift = last_dscale;
  run(&last_dx, &last_dw, &last_dscale, &last_dshift, fasternet::serial(), true);
  check(last_dx.same_bits(dx) && last_dshift.same_bits(dshift) && (!with_scale || last_dscale.same_bits(dscale)) &&
            last_dw.template dense<double>() == filter.to_channels_last(dw.template dense<double>()),
        name, "other bits with a channels-last weight");
  check_threads(name, [&](const ParallelFor& parallel) {
    Tensor<T> again(shape), again_dw = row<T>(c_out * shape.channels * kh * kw);
    Tensor<Compute<T>> again_scale = row<Compute<T>>(c_out), again_shift = again_scale;
    run(&again, &again_dw, &again_scale, &again_shift, parallel);
    std::vector<unsigned char> bytes;
    append(&bytes, again), append(&bytes, again_dw), append(&bytes, again_shift);
    if (with_scale) append(&bytes, again_scale);
    return bytes;
  });
}

template <class T>
void test_type() {
  // Channels and hidden channels around the vectors' and panels' widths.
  for (int64_t channels : {2, 7, 8, 9, 15, 16, 17, 31, 33, 40, 49}) {
    Block<T>({{1, 5, 7, channels}, (channels + 3) / 4, 2 * channels + 8}).test();
  }
  // Not fewer: where a sum stands for itself, a plain loop is exact often enough by luck.
  for (int64_t c_hidden : {15, 16, 17, 23, 24, 31, 33, 47, 49}) {
    Block<T>({{1, 5, 7, 20}, 20, c_hidden, Act::kGelu}).test();
  }
  for (Act act : all_acts()) {
    for (int options = 0; options < 8; ++options) {
      Block<T>({{2, 5, 6, 20}, 5, 40, act, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0}).test();
    }
  }
  // Slices; several tiles, chunks of tiles, chunks of hidden channels, blocks of columns; wide rows; one pixel; none.
  Block<T>({{3, 7, 9, 40}, 10, 80, Act::kGelu, true, true, true, {3, 47}}).test();
  Block<T>({{2, 28, 28, 12}, 3, 24, Act::kSilu, true, true}).test();
  Block<T>({{1, 40, 40, 8}, 8, 20}).test();
  Block<T>({{1, 5, 7, 36}, 9, 300, Act::kGelu}).test();
  Block<T>({{1, 3, 5, 300}, 70, 520}).test();
  Block<T>({{1, 2, 301, 12}, 3, 24}).test();
  Block<T>({{2, 1, 1, 40}, 10, 80}).test();
  Block<T>({{1, 6, 5, 70}, 16, 130}).test();  // whole panels of one kernel column, wide weights
  Block<T>({{1, 6, 5, 129}, 48, 70}).test();
  Block<T>({{1, 14, 14, 48}, 12, 96}).test();  // the last of several tiles' sums are the gradient
  Block<T>({{1, 9, 13, 96}, 96, 40}).test();   // so many columns that add_products gathers both operands
  // Rows of z, and of sums, that share a set of L1: several passes of K, and blocks of a power of two of columns.
  Block<T>({{1, 2, 3, 260}, 8, 1024}).test();
  Block<T>({{1, 5, 7, 128}, 32, 256}).test();
  // Threads that take several chunks each, and tiles of a weight that does not fit L2 as a whole.
  Block<T>({{6, 28, 28, 8}, 2, 20, Act::kRelu, true, true}).test();
  if (Storage<T>::kDType == fasternet::DType::kFloat32) Block<T>({{2, 26, 26, 300}, 75, 520}).test();
  Block<T>({{0, 7, 7, 40}, 10, 80, Act::kGelu, true, true}).test();

  for (Layout layout : {Layout::kChannelsLast, Layout::kChannelsFirst}) {
    for (bool with_scale : {false, true}) {
      test_patches<T>({1, 16, 16, 3}, 40, 4, 4, layout, with_scale);
      test_patches<T>({2, 8, 10, 20}, 40, 2, 2, layout, with_scale);
      test_patches<T>({3, 5, 7, 13}, 17, 2, 3, layout, with_scale);
      test_patches<T>({1, 50, 50, 5}, 25, 1, 1, layout, with_scale);
      test_patches<T>({1, 4, 4, 160}, 60, 2, 2, layout, with_scale);
      test_patches<T>({0, 8, 8, 3}, 16, 4, 4, layout, with_scale);
    }
  }
}

}  // namespace

int main() {
  return run_tests("test_training", [] {
    test_type<float>();
    test_type<double>();
    test_type<BFloat16>();
  });
}
