// The training kernels, once for every instruction set: included by kernels.inl.h inside its namespace.
//
// Each operator walks tiles of pixels as the inference kernels do, and recomputes u and a tile by tile rather than keep
// them. Three kinds of GEMM appear. Those along channels (z, the projection, da, du) are `gemm`'s, whose B operand is
// packed here by each thread for the columns it works on, because weights change at every step. The weight gradients
// run along pixels, dw = g^T a: the micro-kernel `outer` adds products of a few channels of g with a few vectors of a,
// pixel by pixel, and reads them from where these channels and vectors of a tile lie together (Operand).
//
// Work is shared among threads in one of two ways. Where there are many pixels each thread takes tiles, and packs all
// weights for itself; where there are few, each takes columns, and no weight is packed or read twice. Sums over pixels
// are cut into chunks of tiles that depend on the shape alone and added up in order, so that the bits never depend on
// the number of threads.

constexpr int64_t kColumnUnit = 16;  // columns are shared in multiples of it: whole panels
// Columns of the widest tiles there are. Blocks of columns, and pieces of them at least, are multiples of it.
constexpr int64_t kWideColumns = 48;
constexpr int64_t kMostHidden = 288;  // hidden columns in a block of act_pw_residual_backward
constexpr int64_t kPieceUnits = 9;    // of hidden columns whose gradient a thread takes at least, reading all pixels
constexpr int64_t kPixelsPerThread = 512;      // with fewer, packing all weights for each thread shows: share columns
constexpr int64_t kBlockElements = 144 << 10;  // of a packed weight that is walked with once for all tiles: fits L2
constexpr int64_t kChunkPixels = 512;          // of one partial sum of a weight gradient, at least
constexpr int64_t kSmallWeight = 64 << 10;     // a larger weight's partial sums cost more: twice the pixels
constexpr int64_t kMaxChunks = 32;
constexpr int64_t kMostCopied = 16 << 20;  // bytes of a gradient, twice, or of u that are copied whole
// Rows of a weight gradient are shared in multiples of kRowUnit: three groups of 8 rows, two of 12, four of 6.
constexpr int64_t kRowUnit = 24;
constexpr int64_t kPieceRows = 7;  // units that a thread takes at least where it reads all channels of u for them
constexpr int64_t kPieceTaps = 2;  // where it copies the convolved ones alone
constexpr int64_t kSumRows = 16;   // values in one chain of additions

// ---- Vectors of channels, some of them short ------------------------------------------------------------------------

// GCC before 12 does not have shuffles of constants: it goes lane by lane, and packs element by element.
#if defined(__clang__) || __GNUC__ >= 12
#define FASTERNET_SHUFFLES
template <class Half, int... kLane>
inline auto with_zeros(Half v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, Half{}, kLane...);
}
template <class V, int... kLane>
inline auto first_half(V v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, kLane...);
}
#endif

// The first n channels at p; the others are zero. Half a vector, which widths that are no multiple of a vector leave,
// is one load or store.
template <class T, class S>
inline LanesOf<T> load_part(const S* p, int64_t n) {
  constexpr int kLanes = Lanes<T>::kLanes;
  if (n >= kLanes) return load_as<LanesOf<T>>(p);
#ifdef FASTERNET_SHUFFLES
  if constexpr (Same<T, float>::value) {
    using Half = typename VecOf<float, FASTERNET_VECTOR_BYTES / 2>::type;
    if (n == kLanes / 2) return with_zeros(load_as<Half>(p), std::make_integer_sequence<int, kLanes>());
  }
#endif
  T part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = to_compute(p[i]);
  return load_as<LanesOf<T>>(part);
}
template <class T, class S>
inline void store_part(LanesOf<T> v, S* p, int64_t n) {
  constexpr int kLanes = Lanes<T>::kLanes;
  if (n >= kLanes) return store_as(v, p);
#ifdef FASTERNET_SHUFFLES
  if constexpr (Same<T, float>::value) {
    if (n == kLanes / 2) return store_as(first_half(v, std::make_integer_sequence<int, kLanes / 2>()), p);
  }
#endif
  T part[kLanes];
  store_as(v, part);
  for (int64_t i = 0; i < n; ++i) to_storage(part[i], p + i);
}

// f(row0, row1, column, valid lanes) over blocks of kSumRows rows and one vector of columns. That order defeats the
// processor's own prefetching: f asks for what lies kSumRows rows ahead.
template <class T, class F>
inline void for_blocks(int64_t rows, int64_t columns, const F& f) {
  for (int64_t r = 0; r < rows; r += kSumRows) {
    for (int64_t j = 0; j < columns; j += Lanes<T>::kLanes) f(r, clip(r + kSumRows, rows), j, columns - j);
  }
}

// Adds the n lanes of v to sums.
template <class T>
inline void add_lanes(LanesOf<T> v, int64_t n, double* sums) {
  constexpr int kLanes = Lanes<T>::kLanes;
  T part[kLanes];
  store_as(v, part);
  if (n >= kLanes) {
    for (int i = 0; i < kLanes; ++i) sums[i] += part[i];
  } else {
    for (int64_t i = 0; i < n; ++i) sums[i] += part[i];
  }
}

// Elements from row to row of a scratch of `columns` columns: whole vectors, and an odd number of cache lines, so that
// neighbouring rows do not compete for the same set of the cache.
template <class T>
int64_t row_pitch(int64_t columns) {
  return (ceil_div(columns, panel_width<T>()) | 1) * panel_width<T>();
}

// out[rows][out_stride] = source * factor[row], converted.
template <class S, class T, class D>
struct Scaled {
  const S* from;
  T factor;
  D* to;
  template <class V>
  void run(int64_t j) const {
    store_as(load_as<V>(from + j) * factor, to + j);
  }
};
template <class S, class D, class T>
void copy_rows(const S* source, int64_t stride, int64_t rows, int64_t columns, const T* factor, D* out,
               int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, source += stride, out += out_stride) {
    if (factor) {
      for_columns<T>(columns, Scaled<S, T, D>{source, factor[r], out});
    } else {
      combine<T>(source, static_cast<const T*>(nullptr), out, columns);
    }
  }
}

// Scratch whose rows end in columns that are read but never written: left as they are they could hold numbers that are
// slow to multiply.
template <class T>
void clear(T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

// ---- Activations and their derivatives ------------------------------------------------------------------------------

template <class F>
void with_act(Act act, const F& f) {
  switch (act) {
    case Act::kIdentity:
      return f.template run<Act::kIdentity>();
    case Act::kRelu:
      return f.template run<Act::kRelu>();
    case Act::kGelu:
      return f.template run<Act::kGelu>();
    case Act::kGeluTanh:
      return f.template run<Act::kGeluTanh>();
    case Act::kSilu:
      return f.template run<Act::kSilu>();
    case Act::kHardswish:
      return f.template run<Act::kHardswish>();
  }
}

// a = act(x) and da becomes da * act'(x). Where the derivative is zero the gradient is, whatever da.
template <Act kAct, class VT>
inline void act_and_gradient_ps(typename VT::type x, typename VT::type* a, typename VT::type* da) {
  using V = typename VT::type;
  const V zero = {};
  if constexpr (kAct == Act::kRelu) {
    *a = x < zero ? zero : x;
    *da = x <= zero ? zero : *da;
  } else if constexpr (kAct == Act::kGelu) {
    V slope;
    gelu_and_slope_ps<VT>(x, a, &slope);
    *da *= slope;
  } else if constexpr (kAct == Act::kGeluTanh || kAct == Act::kSilu) {
    // x * s(y), s(y) = 1 / (1 + exp(-y)), y = x or as in act_ps. 1 - s cancels, exp(-y) * s does not.
    const V square = x * x;
    const V y = kAct == Act::kSilu ? x : (square * 0.044715f + 1.0f) * x * 1.5957691216057308f;
    const V slope = kAct == Act::kSilu ? zero + 1.0f : (square * (3 * 0.044715f) + 1.0f) * 1.5957691216057308f;
    const V e = exp_ps<VT>(-y);
    const V s = y < zero - 87.0f ? zero : 1.0f / (e + 1.0f);  // as in sigmoid_ps
    *a = x * s;
    *da *= e * s * s * x * slope + s;
  } else if constexpr (kAct == Act::kHardswish) {
    *a = act_ps<kAct, VT>(x);
    const V inside = x < zero + 3.0f ? *da * (x * (1.0f / 3.0f) + 0.5f) : *da;
    *da = x <= zero - 3.0f ? zero : inside;
  } else {
    *a = x;
  }
}
template <Act kAct>
inline void act_and_gradient_pd(double x, double* a, double* da) {
  *a = act_pd<kAct>(x);
  if constexpr (kAct == Act::kRelu) {
    *da = x <= 0.0 ? 0.0 : *da;
  } else if constexpr (kAct == Act::kGelu) {
    *da *= 0.5 * (1.0 + ::erf(x * 0.70710678118654752440)) + x * ::exp(-0.5 * x * x) * 0.39894228040143267794;
  } else if constexpr (kAct == Act::kGeluTanh) {
    const double t = ::tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x));
    *da *= 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.79788456080286535588 * (1.0 + 3 * 0.044715 * x * x);
  } else if constexpr (kAct == Act::kSilu) {
    const double s = 1.0 / (1.0 + ::exp(-x));
    *da *= s * (1.0 + x * (1.0 - s));
  } else if constexpr (kAct == Act::kHardswish) {
    const double inside = x < 3.0 ? *da * (x / 3.0 + 0.5) : *da;
    *da = x <= -3.0 ? 0.0 : inside;
  }
}
template <Act kAct, class T>
inline void act_and_gradient(LanesOf<T> x, LanesOf<T>* a, LanesOf<T>* da) {
  if constexpr (Same<T, double>::value) {
    act_and_gradient_pd<kAct>(x, a, da);
  } else {
    act_and_gradient_ps<kAct, typename Lanes<T>::VT>(x, a, da);
  }
}
template <Act kAct, class T>
inline LanesOf<T> act_of(LanesOf<T> x) {
  if constexpr (Same<T, double>::value) {
    return act_pd<kAct>(x);
  } else {
    return act_ps<kAct, typename Lanes<T>::VT>(x);
  }
}

// ---- Batch norm and activation of a tile ----------------------------------------------------------------------------

// The batch norm of some columns: vectors that start at the first of them.
template <class T>
struct Norm {
  const T* mean;
  const T* scale;
  const T* shift;
  Norm at(int64_t column) const { return {mean + column, scale + column, shift + column}; }
};

// a[rows][a_stride] = act((z - mean) * scale + shift); with kFill whole vectors, else the columns alone.
template <class S, class T, class A, bool kFill>
struct BnActTile {
  const S* z;
  int64_t z_stride, rows, columns;
  Norm<T> norm;
  A* a;
  int64_t a_stride;

  template <Act kAct>
  void run() const {
    for_blocks<T>(rows, columns, [&](int64_t row0, int64_t row1, int64_t j, int64_t n) {
      const LanesOf<T> mean = load_part<T>(norm.mean + j, n), scale = load_part<T>(norm.scale + j, n),
                       shift = load_part<T>(norm.shift + j, n);
      for (int64_t r = row0; r < row1; ++r) {
        __builtin_prefetch(z + (r + kSumRows) * z_stride + j);
        const LanesOf<T> centred = load_part<T>(z + r * z_stride + j, n) - mean;
        const LanesOf<T> value = act_of<kAct, T>(centred * scale + shift);
        store_part<T>(value, a + r * a_stride + j, kFill ? Lanes<T>::kLanes : n);
      }
    });
  }
};

// From da, the gradient of a: with dt = da * factor[row] * act'(t), t = (z - mean) * scale + shift,
// dz = dt * scale, and to the sums dshift += dt and dscale += dt * (z - mean). Also a itself. What is null is left out.
template <class S, class D, class T>
struct BnActBackwardTile {
  const D* da;
  int64_t da_stride;
  const S* z;
  int64_t z_stride, rows, columns;
  Norm<T> norm;
  const T* factor;
  S* dz;
  int64_t dz_stride;
  T* a;
  int64_t a_stride;
  double* dscale;
  double* dshift;

  template <Act kAct>
  void run() const {
    using V = LanesOf<T>;
    for_blocks<T>(rows, columns, [&](int64_t row0, int64_t row1, int64_t j, int64_t n) {
      const V mean = load_part<T>(norm.mean + j, n), scale = load_part<T>(norm.scale + j, n),
              shift = load_part<T>(norm.shift + j, n);
      V sum = {}, product = {};
      for (int64_t r = row0; r < row1; ++r) {
        __builtin_prefetch(z + (r + kSumRows) * z_stride + j);
        if (dz) __builtin_prefetch(dz + (r + kSumRows) * dz_stride + j, 1);
        const V centred = load_part<T>(z + r * z_stride + j, n) - mean;
        V dt = load_part<T>(da + r * da_stride + j, n), value;
        if (factor) dt *= factor[r];
        act_and_gradient<kAct, T>(centred * scale + shift, &value, &dt);
        sum += dt;
        product += dt * centred;
        if (dz) store_part<T>(dt * scale, dz + r * dz_stride + j, n);
        if (a) store_as(value, a + r * a_stride + j);
      }
      if (dshift) add_lanes<T>(sum, n, dshift + j);
      if (dscale) add_lanes<T>(product, n, dscale + j);
    });
  }
};

// The gradient of z where its statistics depend on it too: dz + dmean / pixels + 2 * dm2 * (z - mean). Without z it is
// dz alone.
template <class S, class T>
struct TotalGradient {
  const S* dz;
  int64_t dz_stride;
  const S* z;
  int64_t z_stride;
  const T* mean;
  T* dmean;  // divided by the number of pixels
  T* dm2;    // twice

  void take(Carver* carver, int64_t columns) {
    dmean = carver->take<T>(z ? columns : 0);
    dm2 = carver->take<T>(z ? columns : 0);
  }
  void prepare(const void* dmean_, const void* dm2_, int64_t columns, int64_t pixels) const {
    const T count = static_cast<T>(pixels > 0 ? pixels : 1);
    for (int64_t c = 0; z && c < columns; ++c) {
      dmean[c] = static_cast<const T*>(dmean_)[c] / count;
      dm2[c] = 2 * static_cast<const T*>(dm2_)[c];
    }
  }
  void tile(int64_t pixel, int64_t rows, int64_t column, int64_t columns, T* out, int64_t out_stride) const {
    const S* const from = dz + pixel * dz_stride + column;
    if (!z) return copy_rows<S, T>(from, dz_stride, rows, columns, static_cast<const T*>(nullptr), out, out_stride);
    const S* const from_z = z + pixel * z_stride + column;
    for_blocks<T>(rows, columns, [&](int64_t row0, int64_t row1, int64_t j, int64_t n) {
      const LanesOf<T> centre = load_part<T>(mean + column + j, n), off = load_part<T>(dmean + column + j, n),
                       slope = load_part<T>(dm2 + column + j, n);
      for (int64_t r = row0; r < row1; ++r) {
        __builtin_prefetch(from + (r + kSumRows) * dz_stride + j);
        __builtin_prefetch(from_z + (r + kSumRows) * z_stride + j);
        const LanesOf<T> centred = load_part<T>(from_z + r * z_stride + j, n) - centre;
        store_as(centred * slope + (load_part<T>(from + r * dz_stride + j, n) + off), out + r * out_stride + j);
      }
    });
  }
};

// mean = pivot + off and m2 (sum of squared deviations from it) of each column. Deviations are taken from a pivot, the
// mean of the first pixels, which keeps the digits of channels far from zero: it is off the tile's own mean by so
// little that m2 = sum d^2 - (sum d)^2 / rows loses at most a factor rows / 8 in relative error, whatever the values.
template <class S, class T>
void tile_statistics(const S* z, int64_t stride, int64_t rows, int64_t columns, double* pivots, double* offs,
                     double* m2) {
  using V = LanesOf<T>;
  constexpr int kLanes = Lanes<T>::kLanes;
  const int64_t first = clip(8, rows);
  const T share = T(1) / static_cast<T>(first);
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t n = columns - j;
    V pivot = {};
    for (int64_t r = 0; r < first; ++r) pivot += load_part<T>(z + r * stride + j, n) * share;
    if constexpr (Same<S, bf16>::value) {  // rounded: differences of two bfloat16 are exact
      S rounded[kLanes];
      store_as(pivot, rounded);
      pivot = load_as<V>(rounded);
    }
    double sums[kLanes] = {}, squares[kLanes] = {};
    for (int64_t row0 = 0; row0 < rows; row0 += kSumRows) {
      V sum = {}, square = {};
      for (int64_t r = row0; r < clip(row0 + kSumRows, rows); ++r) {
        const V d = load_part<T>(z + r * stride + j, n) - pivot;
        sum += d;
        square += d * d;
      }
      add_lanes<T>(sum, kLanes, sums);
      add_lanes<T>(square, kLanes, squares);
    }
    T part[kLanes];
    store_as(pivot, part);
    for (int64_t i = 0; i < clip(kLanes, n); ++i) {
      const double off = sums[i] / static_cast<double>(rows), left = squares[i] - sums[i] * off;
      pivots[j + i] = part[i];
      offs[j + i] = off;
      m2[j + i] = left < 0 ? 0 : left;
    }
  }
}

// The statistics of every tile, which become those of all pixels.
struct Statistics {
  int64_t columns;
  double *pivots, *offs, *m2;  // [tile][column]

  void take(Carver* carver, int64_t tiles, int64_t columns_) {
    columns = columns_;
    pivots = carver->take<double>(tiles * columns);
    offs = carver->take<double>(tiles * columns);
    m2 = carver->take<double>(tiles * columns);
  }
  // Of `width` columns from `column` on of tile i.
  template <class T, class S>
  void add(int64_t i, const S* z, int64_t stride, int64_t rows, int64_t column, int64_t width) const {
    const int64_t at = i * columns + column;
    tile_statistics<S, T>(z, stride, rows, width, pivots + at, offs + at, m2 + at);
  }
  // Chan, Golub and LeVeque's formula, tile by tile, in the first tile's place; means stay relative to its pivot.
  template <class T>
  void combine_tiles(const Tiling& tiling, void* mean, void* all_m2, const ParallelFor& parallel) const {
    parallel_for(parallel, ceil_div(columns, kColumnUnit), [&](int64_t begin, int64_t end) {
      const int64_t c0 = begin * kColumnUnit, c1 = clip(end * kColumnUnit, columns);
      double count = 0;
      for (int64_t i = 0; i < tiling.tiles; ++i) {
        const double pixels = static_cast<double>(tiling.tile(i).pixels()), total = count + pixels;
        for (int64_t c = c0; i > 0 && c < c1; ++c) {
          const int64_t at = i * columns + c;
          const double delta = (pivots[at] - pivots[c]) + (offs[at] - offs[c]);
          offs[c] += delta * (pixels / total);
          m2[c] += m2[at] + delta * delta * (count * pixels / total);
        }
        count = total;
      }
      for (int64_t c = c0; c < c1; ++c) {
        static_cast<T*>(mean)[c] =
            tiling.tiles ? static_cast<T>(pivots[c] + offs[c]) : static_cast<T>(__builtin_nan(""));
        static_cast<T*>(all_m2)[c] = tiling.tiles ? static_cast<T>(m2[c]) : T(0);
      }
    });
  }
};

// ---- Operands -------------------------------------------------------------------------------------------------------

// Lane j of row i and lane i of row j change places: in each round the rows, and the lanes, whose numbers differ in
// one bit.
#ifdef FASTERNET_SHUFFLES
template <int kBit, class V, int... kLane>
inline void exchange(V* low, V* high, std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  const V a = *low, b = *high;
  *low = __builtin_shufflevector(a, b, (kLane & kBit ? kLanes + kLane - kBit : kLane)...);
  *high = __builtin_shufflevector(a, b, (kLane & kBit ? kLanes + kLane : kLane + kBit)...);
}
template <int kBit, int kLanes, class V>
inline void transpose(V* rows) {
  if constexpr (kBit < kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & kBit)) exchange<kBit>(rows + i, rows + i + kBit, std::make_integer_sequence<int, kLanes>());
    }
    transpose<2 * kBit, kLanes>(rows);
  }
}
#endif

// to[i][lane] = w[lane * n_stride + i * k_stride] for i < k: rows of `lanes`, a panel or half of one, the first `valid`
// of them there and the others zero.
template <class S, class T>
void pack_panel(const S* w, int64_t n_stride, int64_t k_stride, int64_t lanes, int64_t valid, int64_t k, T* to) {
  constexpr int64_t kWidth = panel_width<T>(), kRun = 16;
  int64_t k0 = 0;
#ifdef FASTERNET_SHUFFLES
  if constexpr (Same<T, float>::value) {
    if (k_stride == 1 && valid == kWidth) {
      for (; k0 + kFloatLanes <= k; k0 += kFloatLanes) {
        for (int64_t lane = 0; lane < kWidth; lane += kFloatLanes) {
          LanesOf<T> rows[kFloatLanes];
          for (int i = 0; i < kFloatLanes; ++i) rows[i] = load_as<LanesOf<T>>(w + (lane + i) * n_stride + k0);
          transpose<1, kFloatLanes>(rows);
          for (int i = 0; i < kFloatLanes; ++i) store(to + (k0 + i) * kWidth + lane, rows[i]);
        }
      }
    }
  }
#endif
  for (; k0 < k; k0 += kRun) {  // a cache line of each output channel at a time
    const int64_t run = clip(kRun, k - k0);
    T* const block = to + k0 * lanes;
    for (int64_t lane = 0; lane < valid; ++lane) {
      const S* const source = w + lane * n_stride + k0 * k_stride;
      for (int64_t i = 0; i < run; ++i) block[i * lanes + lane] = to_compute(source[i * k_stride]);
    }
    for (int64_t i = 0; i < run; ++i) {
      for (int64_t lane = valid; lane < lanes; ++lane) block[i * lanes + lane] = 0;
    }
  }
}

// Packs B[k][n] = w[n * n_stride + k * k_stride] * n_scale[n] * k_scale[k] in the panels of Packed, without a shift.
// One of the strides is 1.
template <class S, class T>
void pack_operand(const S* w, int64_t n_stride, int64_t k_stride, int64_t n, int64_t k, const T* n_scale,
                  const T* k_scale, T* out) {
  constexpr int64_t kWidth = panel_width<T>(), kPanels = 4, kAhead = 16;
  const int64_t n_padded = padded_n(n, sizeof(T));
  int64_t n0 = 0;
  // Each row of a wide weight lies in a page of its own, so several panels at a time.
  while (n_stride == 1 && n0 + kWidth <= n) {
    const int64_t panels = n0 + kPanels * kWidth <= n ? kPanels : 1;
    T* const to = out + n0 * k;
    for (int64_t i = 0; i < k; ++i) {
      const S* const source = w + n0 + i * k_stride;
      for (int64_t panel = 0; panel < panels; ++panel) {
        __builtin_prefetch(source + kAhead * k_stride + panel * kWidth);
        T* const row = to + (panel * k + i) * kWidth;
        for (int64_t lane = 0; lane < kWidth; ++lane) row[lane] = to_compute(source[panel * kWidth + lane]);
      }
    }
    n0 += panels * kWidth;
  }
  for (; n0 < n_padded; n0 += kWidth) {
    const int64_t lanes = clip(kWidth, n_padded - n0);
    pack_panel<S, T>(w + n0 * n_stride, n_stride, k_stride, lanes, clip(lanes, n - n0), k, out + n0 * k);
  }
  if (!n_scale && !k_scale) return;
  for (n0 = 0; n0 < n_padded; n0 += kWidth) {
    const int64_t lanes = clip(kWidth, n_padded - n0), valid = clip(lanes, n - n0);
    for (int64_t i = 0; i < k; ++i) {
      T* const row = out + n0 * k + i * lanes;
      for (int64_t lane = 0; k_scale && lane < valid; ++lane) row[lane] *= k_scale[i];
      for (int64_t lane = 0; n_scale && lane < valid; ++lane) row[lane] *= n_scale[n0 + lane];
    }
  }
}

// A weight of a convolution as it came: (out, in, taps), or channels-last, (out, taps, in).
template <class S>
struct WeightView {
  S* data;
  int64_t in, taps;  // extents
  bool channels_last;
  int64_t out_stride() const { return in * taps; }
  int64_t in_stride() const { return channels_last ? 1 : taps; }
  int64_t tap_stride() const { return channels_last ? in : 1; }
  S* at(int64_t n, int64_t c, int64_t tap) const {
    return data + n * out_stride() + c * in_stride() + tap * tap_stride();
  }
};

// Packs output channels [n0, n1) of the 3x3 kernel w (c_partial, c_partial, 3, 3) for PConvTile, or with `transposed`
// of the one that takes gradients of the output to gradients of the input.
template <class S, class T>
void pack_conv3x3(const WeightView<const S>& w, bool transposed, int64_t n0, int64_t n1, T* out) {
  constexpr int64_t kWidth = panel_width<T>(), kRun = 16;
  const int64_t c_partial = w.in, tap_stride = w.tap_stride();
  const int64_t n_stride = transposed ? w.in_stride() : w.out_stride(),
                c_stride = transposed ? w.out_stride() : w.in_stride();
  const int64_t width = n1 - n0, n = 3 * width, n_padded = padded_n(n, sizeof(T)), depth = 3 * c_partial;
  const int64_t last = (n - 1) / kWidth * kWidth, last_lanes = n_padded - last;
  if (w.channels_last && width % kWidth == 0) {  // whole panels of one kernel column
    for (int64_t at = 0; at < n; at += kWidth) {
      for (int64_t row = 0; row < 3; ++row) {
        const int64_t tap = 3 * row + at / width;
        pack_panel<S, T>(w.data + (transposed ? 8 - tap : tap) * tap_stride + (n0 + at % width) * n_stride, n_stride,
                         c_stride, kWidth, kWidth, c_partial, out + at * depth + row * c_partial * kWidth);
      }
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = n - last; j < last_lanes; ++j) out[last * depth + k * last_lanes + j] = 0;
  }
  for (int64_t o0 = 0; o0 < width; o0 += kWidth) {
    for (int64_t c0 = 0; c0 < c_partial; c0 += kRun) {
      for (int64_t o = o0; o < clip(o0 + kWidth, width); ++o) {
        for (int64_t column = 0; column < 3; ++column) {
          const int64_t at = column * width + o, panel = at / kWidth * kWidth;
          const int64_t lanes = panel == last ? last_lanes : kWidth;
          T* const to = out + panel * depth + at - panel;
          for (int64_t c = c0; c < clip(c0 + kRun, c_partial); ++c) {
            const S* const taps = w.data + (n0 + o) * n_stride + c * c_stride;
            for (int64_t row = 0; row < 3; ++row) {
              const int64_t tap = 3 * row + column;
              to[(row * c_partial + c) * lanes] = to_compute(taps[(transposed ? 8 - tap : tap) * tap_stride]);
            }
          }
        }
      }
    }
  }
}
// ---- Products along pixels ------------------------------------------------------------------------------------------

constexpr int kOuterUnroll = 2;

// sums[kRows][kVecs vectors] (+)= sum over pixels of a[pixel][row] * b[pixel][column], in chains of additions, `chain`
// pixels long, of which the last goes to c; that may be sums as well. Each turn of kOuterUnroll pixels fetches a cache
// line from `prefetch` on, `prefetch_step` bytes apart.
template <class T>
struct Outer {
  const T* a;
  int64_t a_stride;
  const T* b;
  int64_t b_stride;
  int64_t pixels, chain;
  bool add;
  T* sums;
  int64_t sums_stride;
  T* c;
  int64_t c_stride;
  const char* prefetch;
  int64_t prefetch_step;
};
template <class T, int kRows, int kVecs>
void outer(const Outer<T>& o) {
  using V = typename VecOf<T, FASTERNET_VECTOR_BYTES>::type;
  constexpr int kLanes = VecOf<T, FASTERNET_VECTOR_BYTES>::kLanes;
  const T *a = o.a, *b = o.b;
  bool add = o.add;
  const char* prefetch = o.prefetch;
  for (int64_t left = o.pixels; left > 0; left -= o.chain) {
    V acc[kRows][kVecs];
    FASTERNET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTERNET_UNROLL
      for (int j = 0; j < kVecs; ++j) acc[r][j] = V{};
    }
    const int64_t pixels = clip(o.chain, left), stride = left > o.chain ? o.sums_stride : o.c_stride;
    T* const to = left > o.chain ? o.sums : o.c;
    const auto step = [&](const T* values, const T* columns) __attribute__((always_inline)) {
      V w[kVecs];
      FASTERNET_UNROLL
      for (int j = 0; j < kVecs; ++j) w[j] = load<V>(columns + j * kLanes);
      FASTERNET_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const bool from_memory = kFmaFromMemory && r % 3 == 0;  // more would be too many loads, as in micro
        const V factor = from_memory ? V{} : values[r] - V{};
        FASTERNET_UNROLL
        for (int j = 0; j < kVecs; ++j) {
          from_memory ? multiply_add_from(acc[r][j], w[j], values + r) : multiply_add(acc[r][j], w[j], factor);
        }
      }
    };
    const auto advance = [&](int steps) __attribute__((always_inline)) {
      a += steps * o.a_stride;
      b += steps * o.b_stride;
    };
    for (int64_t turns = pixels / kOuterUnroll; turns > 0; --turns, prefetch += o.prefetch_step) {
      __builtin_prefetch(prefetch, 0, 2);
      FASTERNET_UNROLL
      for (int u = 0; u < kOuterUnroll; ++u) step(a + u * o.a_stride, b + u * o.b_stride);
      advance(kOuterUnroll);
    }
    for (int64_t p = pixels % kOuterUnroll; p > 0; --p) {
      step(a, b);
      advance(1);
    }
    FASTERNET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTERNET_UNROLL
      for (int j = 0; j < kVecs; ++j) {
        const V sum = add ? acc[r][j] + load<V>(o.sums + r * o.sums_stride + j * kLanes) : acc[r][j];
        store(to + r * stride + j * kLanes, sum);
      }
    }
    add = true;
  }
}

// to[pixels][columns] = from, whose pixels are `stride` elements apart; whole vectors.
template <class T>
void copy_vectors(const T* from, int64_t stride, int64_t pixels, int64_t columns, T* to) {
  using V = typename VecOf<T, FASTERNET_VECTOR_BYTES>::type;
  for (int64_t p = 0; p < pixels; ++p, from += stride, to += columns) {
    for (int64_t j = 0; j < columns; j += VecOf<T, FASTERNET_VECTOR_BYTES>::kLanes) store(to + j, load<V>(from + j));
  }
}

// to[pixels][kRows] = a, whose pixels are `stride` elements apart.
template <class T, int kRows>
void gather(const T* a, int64_t stride, int64_t pixels, T* to) {
  for (int64_t p = 0; p < pixels; ++p, a += stride, to += kRows) __builtin_memcpy(to, a, kRows * sizeof(T));
}

// The most rows of a tile of so many vectors. In the 32 registers of AVX-512 9 rows x 3 vectors, whose 27 products take
// 36 instructions a pixel, and of rows in place 6 x 4 or 12 x 2 where three do not divide the columns; AArch64, which
// does not multiply from memory, has 8 x 3; in 16 registers 4 x 3 and 6 x 2.
#if defined(__aarch64__)
constexpr int kOuterVecs = 4, kOuterRows[] = {12, 12, 8, 6};
#else
constexpr int kOuterVecs = FASTERNET_VECTOR_BYTES == 64 ? 4 : 3;
constexpr int kOuterRows[] = {FASTERNET_VECTOR_BYTES == 64 ? 12 : 6, FASTERNET_VECTOR_BYTES == 64 ? 12 : 6,
                              FASTERNET_VECTOR_BYTES == 64 ? 9 : 4, 6};
#endif
constexpr int outer_rows(int vecs) { return kOuterRows[vecs - 1]; }
template <class T, int kVecs>
struct OuterTable {
  void (*rows[outer_rows(kVecs) + 1])(const Outer<T>&);
  constexpr OuterTable() : rows() { fill<1>(); }
  template <int kRows>
  constexpr void fill() {
    rows[kRows] = outer<T, kRows, kVecs>;
    if constexpr (kRows < outer_rows(kVecs)) fill<kRows + 1>();
  }
};
template <class T, int kVecs>
constexpr OuterTable<T, kVecs> kOuter{};

constexpr int kDenseRows = outer_rows(3);  // the most of a dense group, whatever the columns
template <class T>
struct GatherTable {
  void (*rows[kDenseRows + 1])(const T*, int64_t, int64_t, T*);
  constexpr GatherTable() : rows() { fill<1>(); }
  template <int kRows>
  constexpr void fill() {
    rows[kRows] = gather<T, kRows>;
    if constexpr (kRows < kDenseRows) fill<kRows + 1>();
  }
};
template <class T>
constexpr GatherTable<T> kGather{};

// The tile of the next columns, of which `left` vectors are left. Four are one tile of rows in place, or as in
// column_tile two of two, which dense groups of rows fit.
template <class T>
struct OuterTile {
  int64_t vectors;
  int most_rows;
  void (*const* rows)(const Outer<T>&);
};
template <class T>
OuterTile<T> outer_tile(int64_t left, bool dense) {
  if (left == 4 && kOuterVecs == 4 && !dense) return {4, outer_rows(4), kOuter<T, kOuterVecs>.rows};
  if (left == 3 || left > 4) return {3, outer_rows(3), kOuter<T, 3>.rows};
  if (left > 1) return {2, outer_rows(2), kOuter<T, 2>.rows};
  return {1, outer_rows(1), kOuter<T, 1>.rows};
}

// Where a product along pixels finds an operand. In rows `stride` apart the pixels of a tile are each on another page,
// and their cache lines more than L1 has room for; so rows are brought together in groups and columns in tiles, for all
// pixels beforehand or by add_products for its own. Dense operands are cut for the very m and n of the product, and
// dense columns go with dense rows.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;
  int64_t pixels = 0, first = 0;  // dense: of so many pixels, of which this is the first one wanted
  const T* at(int64_t column, int64_t width) const {
    return pixels ? data + column * pixels + first * width : data + column;
  }
};
// m rows in groups of nearly equal size.
struct RowGroups {
  int64_t m, count;
  RowGroups(int64_t m_, int most) : m(m_), count(ceil_div(m_, most)) {}
  int64_t first(int64_t i) const { return i * m / count; }
  int64_t rows(int64_t i) const { return first(i + 1) - first(i); }
};
// f(first column, columns) of the dense tiles of n columns.
template <class T, class F>
void for_column_tiles(int64_t n, const F& f) {
  constexpr int64_t kLanes = VecOf<T, FASTERNET_VECTOR_BYTES>::kLanes;
  for (int64_t j = 0; j < n;) {
    const int64_t width = outer_tile<T>((n - j) / kLanes, true).vectors * kLanes;
    f(j, width);
    j += width;
  }
}

// sums[m][n] (+)= sum over pixels of a[pixel][m] * b[pixel][n], the last additions in c. n is whole panels. Chains of
// additions are kOuterDepth long at most, which keeps the rounding error of many pixels near that of a few. While it
// runs it fetches what lies ahead.
constexpr int64_t kOuterDepth = kTilePixels / 2;
constexpr int64_t kShortRow = 24;        // pixels that are too few for reading and writing c
constexpr int64_t kManyColumns = 256;    // from here on both operands are copied, if they are not dense
constexpr int64_t kGatheredGroups = 16;  // of rows that are gathered at a time: 64 KB of a tile of AVX-512
template <class T>
struct Sums {
  bool add;
  T* sums;
  int64_t sums_stride;
  T* c;
  int64_t c_stride;
};
template <class T>
void add_products(const Operand<T>& a, int64_t m, const Operand<T>& b, int64_t n, int64_t pixels, const Sums<T>& sums,
                  Ahead* ahead = nullptr) {
  constexpr int64_t kLanes = VecOf<T, FASTERNET_VECTOR_BYTES>::kLanes;
  if (pixels <= 0) return;
  // Copies pay where many columns read a gathered row, and where a small network's operands are in reach they do not.
  const bool dense = a.pixels || b.pixels || n >= kManyColumns, gathers = dense && !a.pixels;
  const RowGroups all(m, kDenseRows);
  const int64_t at_a_time = gathers ? kGatheredGroups : all.count;
  T *columns, *gathered;
  Carver carver;
  for (int round = 0; round < 2; ++round) {
    if (round) carver = {static_cast<char*>(scratch(kSlotProducts, carver.used)), 0};
    columns = carver.take<T>(dense && !b.pixels ? 3 * kLanes * pixels : 0);
    gathered = carver.take<T>(gathers ? clip(m, kGatheredGroups * kDenseRows) * pixels : 0);
  }
  Outer<T> o = {};
  o.pixels = pixels;
  o.chain = ceil_div(pixels, ceil_div(pixels, kOuterDepth));
  o.add = sums.add;
  o.sums_stride = sums.sums_stride;
  o.c_stride = sums.c_stride;
  for (int64_t begin = 0; begin < all.count; begin += at_a_time) {
    const int64_t end = clip(begin + at_a_time, all.count), row0 = all.first(begin);
    for (int64_t i = begin; gathers && i < end; ++i) {
      const int64_t row = all.first(i);
      kGather<T>.rows[all.rows(i)](a.at(row, 0), a.stride, pixels, gathered + (row - row0) * pixels);
    }
    for (int64_t j = 0; j < n;) {
      const OuterTile<T> tile = outer_tile<T>((n - j) / kLanes, dense);
      const int64_t width = tile.vectors * kLanes;
      o.b = b.at(j, width);
      o.b_stride = dense ? width : b.stride;
      if (dense && !b.pixels && b.stride != width) {
        copy_vectors(o.b, b.stride, pixels, width, columns);
        o.b = columns;
      }
      const RowGroups groups = dense ? all : RowGroups(m, tile.most_rows);
      for (int64_t i = begin; i < (dense ? end : groups.count); ++i) {
        const int64_t row = groups.first(i), rows = groups.rows(i);
        const char* fetch = nullptr;
        if (a.pixels && j == 0 && i + 1 < end) {  // the next rows, which no other tile of columns has brought
          fetch = reinterpret_cast<const char*>(a.at(row + rows, groups.rows(i + 1)));
        } else if (ahead) {
          fetch = ahead->take(pixels / kOuterUnroll * kPanelBytes);
        }
        o.a = gathers ? gathered + (row - row0) * pixels : a.at(row, rows);
        o.a_stride = dense ? rows : a.stride;
        o.sums = sums.sums + row * sums.sums_stride + j;
        o.c = sums.c + row * sums.c_stride + j;
        o.prefetch = fetch ? fetch : reinterpret_cast<const char*>(o.b);
        o.prefetch_step = fetch ? kPanelBytes : 0;
        tile.rows[rows](o);
      }
      j += width;
    }
  }
}

// ---- Sharing work ---------------------------------------------------------------------------------------------------

// At most `most` columns, but one tile at least.
inline int64_t whole_tiles(int64_t most) {
  return most < kWideColumns ? kWideColumns : most / kWideColumns * kWideColumns;
}

// Of a GEMM with n columns and depth k over all tiles.
struct Share {
  bool by_columns;
  int64_t block;  // columns whose packed weight is kept while the tiles go by
  Share(int64_t pixels, int64_t n, int64_t k, int threads) {
    by_columns = pixels < kPixelsPerThread * threads && n > 2 * kColumnUnit;
    block = whole_tiles(kBlockElements / (k > 0 ? k : 1));
    if (block > n) block = n;
  }
  bool tile_by_tile(int64_t n) const { return !by_columns && block >= n; }
  // From row to row of the sums of a block of columns.
  template <class T>
  int64_t sums_stride() const {
    return spread<T>(round_up(block, panel_width<T>()));
  }
};

// run(tile0, tile1, n0, n1, packed_already) on all tiles and all n columns. packed_already: the thread has just run
// other tiles, and the weight that it packed for all n columns is still there. Where it packs block after block of
// columns, it does so again for each piece of tiles, so these are half its share. Where columns are shared, each piece
// reads all pixels, so it is half a block at least.
template <class F>
void share_out(const ParallelFor& parallel, const Share& share, int64_t tiles, int64_t n, const F& run) {
  const bool keeps = share.block >= n;
  const int64_t least = share.by_columns ? whole_tiles(share.block / 2) / kColumnUnit
                        : keeps          ? 1
                                         : ceil_div(tiles, 2 * parallel.num_threads);
  parallel_pieces(parallel, share.by_columns ? ceil_div(n, kColumnUnit) : tiles, least,
                  [&](int64_t begin, int64_t end, bool again) {
                    if (share.by_columns) {
                      run(int64_t{0}, tiles, begin * kColumnUnit, clip(end * kColumnUnit, n), false);
                    } else {
                      run(begin, end, int64_t{0}, n, again && keeps);
                    }
                  });
}

// The tiles in chunks, each of which makes its own partial sums.
struct Chunks {
  int64_t tiles, count;
  Chunks(int64_t tiles_, int64_t pixels, int64_t weight_elements)
      : tiles(tiles_), count(pixels / (weight_elements > kSmallWeight ? 2 * kChunkPixels : kChunkPixels)) {
    if (count > kMaxChunks) count = kMaxChunks;
    if (count > tiles) count = tiles;
    if (count < 1) count = 1;
  }
  int64_t begin(int64_t chunk) const { return chunk * tiles / count; }
  bool many(int threads) const { return count >= 4 * threads; }  // enough to share them whole
};

// run(chunk, n0, n1) on every chunk and all n columns; where there are few chunks in multiples of `unit` columns, at
// least `least` units at a time.
template <class F>
void share_chunks(const ParallelFor& parallel, const Chunks& chunks, int64_t n, int64_t unit, int64_t least,
                  const F& run) {
  if (chunks.many(parallel.num_threads)) unit = n, least = 1;
  const int64_t units = ceil_div(n, unit);
  parallel_pieces(parallel, chunks.count * units, least, [&](int64_t begin, int64_t end, bool) {
    while (begin < end) {
      const int64_t chunk = begin / units, first = begin % units, last = clip(first + end - begin, units);
      run(chunk, first * unit, clip(last * unit, n));
      begin += last - first;
    }
  });
}

// The images of an operator.
struct Extent {
  int64_t height, width, rows, pixels;
  Tiling tiling;
  Extent(int64_t batch, int64_t height_, int64_t width_)
      : height(height_), width(width_), rows(batch * height_), pixels(rows * width_), tiling(rows, width_, 1) {}
};

// ---- The 3x3 convolution ------------------------------------------------------------------------------

// Rows row0 - 1 .. row1 of a tile and the columns around it, zero outside the image, rows of other images as they are;
// after them a row of zeros.
template <class S, class T>
void load_padded_tile(const Image<S>& x, int64_t channels, const Extent& extent, const Tiling::Tile& t, T* padded) {
  const int64_t padded_row = (t.columns() + 2) * channels;
  for (int64_t row = t.row0 - 1; row <= t.row1; ++row) {
    if (row < 0 || row >= extent.rows) continue;
    T* out = padded + (row - t.row0 + 1) * padded_row;
    for (int64_t column = t.column0 - 1; column <= t.column1; ++column, out += channels) {
      if (column < 0 || column >= extent.width) {
        for (int64_t c = 0; c < channels; ++c) out[c] = 0;
        continue;
      }
      combine<T>(x.at(row / extent.height, row % extent.height, column), static_cast<const T*>(nullptr), out, channels);
    }
  }
  T* const zeros = padded + (t.row1 - t.row0 + 2) * padded_row;
  for (int64_t i = 0; i < padded_row; ++i) zeros[i] = 0;
}
inline int64_t padded_elements(const Tiling& tiling, int64_t channels) {
  return (tiling.max_rows() + 3) * (tiling.max_columns() + 2) * channels + 3 * kFloatLanes;
}

// The 3x3 convolution of the first c_partial channels of x, or its transpose: store(tile, first channel, channels, u,
// u_stride) takes the rows of u of a tile, some channels at a time.
template <class W, class S, class T, class F>
void conv3x3_all(const Image<S>& x, const WeightView<const W>& w, bool transposed, const Extent& extent,
                 const ParallelFor& parallel, const F& store) {
  const int64_t c_partial = w.in;
  const Tiling& tiling = extent.tiling;
  const Share share(extent.pixels, c_partial, 9 * c_partial, parallel.num_threads);
  share_out(parallel, share, tiling.tiles, c_partial,
            [&](int64_t tile0, int64_t tile1, int64_t n0, int64_t n1, bool packed_already) {
              for (int64_t b0 = n0; b0 < n1; b0 += share.block) {
                const int64_t channels = clip(b0 + share.block, n1) - b0;
                T* packed = nullptr;
                PConvTile<S, T> pconv(nullptr, c_partial, channels);
                Carver carver;
                for (int round = 0; round < 2; ++round) {
                  if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
                  packed = carver.take<T>(packed_elements(3 * channels, 3 * c_partial, sizeof(T)));
                  pconv.carve(&carver, x, tiling);
                }
                if (!packed_already) pack_conv3x3(w, transposed, b0, b0 + channels, packed);
                pconv.w.data = packed;
                for (int64_t i = tile0; i < tile1; ++i) {
                  const Tiling::Tile t = tiling.tile(i);
                  pconv.run(x, extent.height, extent.width, t, extent.rows, nullptr);
                  store(t, b0, channels, pconv.u, pconv.u_stride);
                }
              }
            });
}
// u[pixels][u_stride] = the 3x3 convolution of the first c_partial channels of x.
template <class S, class T>
void conv3x3_rows(const Image<S>& x, const WeightView<const S>& w, const Extent& extent, T* u, int64_t u_stride,
                  const ParallelFor& parallel) {
  conv3x3_all<S, S, T>(x, w, false, extent, parallel,
                       [&](const Tiling::Tile& t, int64_t first, int64_t channels, const T* rows, int64_t stride) {
                         copy_rows<T, T>(rows, stride, t.pixels(), channels, static_cast<const T*>(nullptr),
                                         u + t.pixel(extent.width) * u_stride + first, u_stride);
                       });
}

// ---- pw_stats -------------------------------------------------------------------------------------------------------

template <class S, class T>
void pw_stats_as(const PwStats& args, const ParallelFor& parallel) {
  const int64_t channels = args.channels, c_partial = args.c_partial, c_out = args.c_out;
  const Extent extent(args.batch, args.height, args.width);
  const Tiling& tiling = extent.tiling;
  const Image<S> x = channels_last<S>(args.x, args.height, args.width, args.x_pixel_stride);
  const WeightView<const S> w_partial = {static_cast<const S*>(args.w_partial), c_partial, 9,
                                         args.w_partial_channels_last};
  const S* const w_pw = static_cast<const S*>(args.w_pw);
  S* const z = static_cast<S*>(args.z);
  const Share share(extent.pixels, c_out, channels, parallel.num_threads);
  const bool fused = share.tile_by_tile(c_out);
  const int64_t u_stride = padded_n(c_partial, sizeof(T)), out_stride = share.sums_stride<T>();
  // Sums that are added up in several passes do so in scratch where z's rows share one set of L1.
  const bool passes_in_scratch = channels > kDepth && must_copy<S, T>(c_out);
  Statistics statistics;
  T* u_all;
  Carver shared;
  for (int round = 0; round < 2; ++round) {
    if (round) shared = {static_cast<char*>(scratch(kSlotShared, shared.used)), 0};
    statistics.take(&shared, tiling.tiles, c_out);
    u_all = shared.take<T>(fused ? 0 : extent.pixels * u_stride);
  }
  if (!fused) conv3x3_rows<S, T>(x, w_partial, extent, u_all, u_stride, parallel);
  share_out(parallel, share, tiling.tiles, c_out,
            [&](int64_t tile0, int64_t tile1, int64_t n0, int64_t n1, bool packed_already) {
              T *packed_partial = nullptr, *packed, *out;
              PConvTile<S, T> pconv(nullptr, c_partial);
              MixedRows<S, T> mixed = {c_partial, channels, u_stride};
              Carver carver;
              for (int round = 0; round < 2; ++round) {
                if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
                if (fused) {
                  packed_partial = carver.take<T>(packed_elements(3 * c_partial, 3 * c_partial, sizeof(T)));
                  pconv.carve(&carver, x, tiling);
                }
                packed = carver.take<T>(packed_elements(share.block, channels, sizeof(T)));
                out = carver.take<T>(tiling.max_pixels() * out_stride);
                mixed.carve(&carver, args.x_pixel_stride, tiling.max_pixels());
              }
              if (fused && !packed_already) pack_conv3x3(w_partial, false, 0, c_partial, packed_partial);
              pconv.w.data = packed_partial;
              for (int64_t b0 = n0; b0 < n1; b0 += share.block) {
                const int64_t b1 = clip(b0 + share.block, n1);
                if (!packed_already)
                  pack_operand<S, T>(w_pw + b0 * channels, channels, 1, b1 - b0, channels, nullptr, nullptr, packed);
                const Packed<T> part(packed, b1 - b0, channels);
                for (int64_t i = tile0; i < tile1; ++i) {
                  const Tiling::Tile t = tiling.tile(i);
                  const int64_t pixel = t.pixel(args.width), pixels = t.pixels();
                  Ahead ahead;
                  if (i + 1 < tile1) {
                    const int64_t after = tiling.tile(i + 1).pixels();
                    ahead.add(x.data, args.x_pixel_stride, pixel + pixels, after);
                    ahead.add(z, c_out, pixel + pixels, after);
                  }
                  if (fused) pconv.run(x, extent.height, extent.width, t, extent.rows, &part, &ahead);
                  const T* const u = fused ? pconv.u : u_all + pixel * u_stride;
                  Gemm<T> g = {};
                  const S* const x_tile = x.data + pixel * args.x_pixel_stride;
                  mixed.load(x_tile, args.x_pixel_stride, 0, pixels);
                  mixed.fill(&g, u, x_tile, args.x_pixel_stride, pixels);
                  g.b = &part;
                  g.n_end = part.n_padded;
                  g.c = out;
                  g.c_stride = out_stride;
                  g.ahead = &ahead;
                  S* const z_tile = z + pixel * c_out + b0;
                  bool direct = false;
                  if constexpr (Same<S, T>::value) {
                    direct = part.n == part.n_padded;
                    if (direct) {
                      g.c = z_tile;
                      g.c_stride = c_out;
                      if (passes_in_scratch) g.sums = out, g.sums_stride = out_stride;
                    }
                  }
                  gemm(g);
                  if (!direct) store_rows<S, T>(out, out_stride, pixels, part.n, z_tile, c_out);
                  statistics.add<T>(i, z_tile, c_out, pixels, b0, part.n);
                }
              }
            });
  statistics.combine_tiles<T>(tiling, args.mean, args.m2, parallel);
}

// ---- bn_act, act_pw_residual ----------------------------------------------------------------------------------------

template <class T>
Norm<T> norm_of(const void* mean, const void* scale, const void* shift) {
  return {static_cast<const T*>(mean), static_cast<const T*>(scale), static_cast<const T*>(shift)};
}

template <class S, class T>
void bn_act_as(const BnAct& args, const ParallelFor& parallel) {
  const S* const z = static_cast<const S*>(args.z);
  S* const y = static_cast<S*>(args.y);
  const Norm<T> norm = norm_of<T>(args.mean, args.scale, args.shift);
  parallel_for(parallel, ceil_div(args.pixels, kSumRows), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kSumRows, rows = clip(end * kSumRows, args.pixels) - first;
    with_act(args.act, BnActTile<S, T, S, false>{z + first * args.z_pixel_stride, args.z_pixel_stride, rows,
                                                 args.channels, norm, y + first * args.channels, args.channels});
  });
}

// S: storage of z, R: of the residual and y, T: compute type.
template <class S, class R, class T>
void act_pw_residual_as(const ActPwResidual& args, const ParallelFor& parallel) {
  const int64_t channels = args.channels, c_hidden = args.c_hidden, area = args.height * args.width;
  const Extent extent(args.batch, args.height, args.width);
  const Tiling& tiling = extent.tiling;
  const S *const z = static_cast<const S*>(args.z), *const w = static_cast<const S*>(args.w_pw2);
  const R* const residual = static_cast<const R*>(args.residual);
  R* const y = static_cast<R*>(args.y);
  const T *const layer_scale = static_cast<const T*>(args.layer_scale), *const sample_scale =
                                                                            static_cast<const T*>(args.sample_scale);
  const Norm<T> norm = norm_of<T>(args.mean, args.scale, args.shift);
  const Share share(extent.pixels, channels, c_hidden, parallel.num_threads);
  // Tile by tile the activation lives in scratch, a chunk of hidden channels at a time; else all of it is made first.
  const bool fused = share.tile_by_tile(channels);
  const int64_t chunk = chunk_width<T>(c_hidden, kHiddenChunk), a_stride = row_pitch<T>(fused ? chunk : c_hidden);
  const int64_t sums_stride = share.sums_stride<T>();
  T* const a_all =
      fused ? nullptr
            : static_cast<T*>(scratch(kSlotShared, extent.pixels * a_stride * static_cast<int64_t>(sizeof(T))));
  if (!fused) {
    parallel_for(parallel, tiling.tiles, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Tiling::Tile t = tiling.tile(i);
        const int64_t pixel = t.pixel(args.width);
        with_act(args.act, BnActTile<S, T, T, true>{z + pixel * args.z_pixel_stride, args.z_pixel_stride, t.pixels(),
                                                    c_hidden, norm, a_all + pixel * a_stride, a_stride});
      }
    });
  }
  share_out(parallel, share, tiling.tiles, channels,
            [&](int64_t tile0, int64_t tile1, int64_t n0, int64_t n1, bool packed_already) {
              T *packed, *a_tile, *sums;
              Carver carver;
              for (int round = 0; round < 2; ++round) {
                if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
                packed = carver.take<T>(packed_elements(share.block, c_hidden, sizeof(T)));
                a_tile = carver.take<T>(fused ? tiling.max_pixels() * a_stride : 0);
                sums = carver.take<T>(tiling.max_pixels() * sums_stride);
              }
              for (int64_t b0 = n0; b0 < n1; b0 += share.block) {
                const int64_t b1 = clip(b0 + share.block, n1);
                if (!packed_already) {
                  pack_operand<S, T>(w + b0 * c_hidden, c_hidden, 1, b1 - b0, c_hidden,
                                     layer_scale ? layer_scale + b0 : nullptr, nullptr, packed);
                }
                const Packed<T> part(packed, b1 - b0, c_hidden);
                const bool direct = Same<R, T>::value && part.n == part.n_padded && !sample_scale;
                for (int64_t i = tile0; i < tile1; ++i) {
                  const Tiling::Tile t = tiling.tile(i);
                  const int64_t pixel = t.pixel(args.width), pixels = t.pixels();
                  const R* const from = residual + pixel * args.residual_pixel_stride + b0;
                  R* const to = y + pixel * channels + b0;
                  Ahead ahead;
                  if (i + 1 < tile1) {
                    const int64_t after = tiling.tile(i + 1).pixels();
                    ahead.add(fused ? z : nullptr, args.z_pixel_stride, pixel + pixels, after);
                    ahead.add(residual, args.residual_pixel_stride, pixel + pixels, after);
                    ahead.add(y, channels, pixel + pixels, after);
                  }
                  Gemm<T> g = {};
                  g.b = &part;
                  g.n_end = part.n_padded;
                  g.c = sums;
                  g.c_stride = sums_stride;
                  g.c_in_stride = sums_stride;
                  g.ahead = &ahead;
                  for (int64_t k = 0; k < c_hidden; k += chunk) {
                    const int64_t depth = clip(chunk, c_hidden - k);
                    if (fused) {
                      with_act(args.act,
                               BnActTile<S, T, T, true>{z + pixel * args.z_pixel_stride + k, args.z_pixel_stride,
                                                        pixels, depth, norm.at(k), a_tile, a_stride});
                    }
                    g.set_a(fused ? a_tile : a_all + pixel * a_stride + k, a_stride, depth, pixels);
                    g.k_begin = k;
                    g.c_in = k ? sums : nullptr;
                    if constexpr (Same<R, T>::value) {
                      if (direct && k + chunk >= c_hidden) {
                        g.c = to;
                        g.c_stride = channels;
                        g.residual = from;
                        g.residual_stride = args.residual_pixel_stride;
                      }
                    }
                    gemm(g);
                  }
                  for (int64_t p = 0; !direct && p < pixels; ++p) {
                    const T* const sum = sums + p * sums_stride;
                    const R* const before = from + p * args.residual_pixel_stride;
                    R* const after = to + p * channels;
                    const T factor = sample_scale ? sample_scale[(pixel + p) / area] : T(1);
                    for_columns<T>(part.n, AddScaled<R, T>{before, factor, sum, after});
                  }
                }
              }
            });
}

// ---- act_pw_residual_backward ---------------------------------------------------------------------------------------

template <class S, class T>
void act_pw_residual_backward_as(const ActPwResidualBackward& args, const ParallelFor& parallel) {
  const int64_t channels = args.channels, c_hidden = args.c_hidden, area = args.height * args.width;
  const Extent extent(args.batch, args.height, args.width);
  const Tiling& tiling = extent.tiling;
  const Chunks chunks(tiling.tiles, extent.pixels, channels * c_hidden);
  const S *const grad = static_cast<const S*>(args.grad), *const z = static_cast<const S*>(args.z),
                 *const w = static_cast<const S*>(args.w_pw2);
  S *const dz = static_cast<S*>(args.dz), *const dw = static_cast<S*>(args.dw_pw2);
  const T *const layer_scale = static_cast<const T*>(args.layer_scale), *const sample_scale =
                                                                            static_cast<const T*>(args.sample_scale);
  const Norm<T> norm = norm_of<T>(args.mean, args.scale, args.shift);
  const bool need_sample = args.dsample_scale != nullptr, need_products = dw || args.dlayer_scale;
  const bool need_da = dz || args.dmean || args.dscale || args.dshift || need_sample;

  // The block of hidden channels, its packed weights and its part of the weight gradient, fits L2.
  const int64_t most = whole_tiles(clip(kBlockElements / 2 / (w ? channels : 1), kMostHidden));
  const int64_t hidden_stride = row_pitch<T>(most), g_stride = row_pitch<T>(channels);
  const int64_t product_stride = row_pitch<T>(c_hidden), units = ceil_div(c_hidden, kColumnUnit);
  // A single chunk's products are final: each block of columns is added up in scratch and goes out once. (Its rows in
  // dw are often a power of two apart, which the caches do not bear.)
  const bool direct = chunks.count == 1 && !args.dlayer_scale;
  // The products read grad converted and scaled, and not from rows a multiple of 512 bytes apart, which would compete
  // for a few sets of the cache. Where threads share columns that copy is made once, unless it is large, and gathered
  // for the products; da is computed from it too, unless it is scaled.
  const bool copies = need_products && (!Same<S, T>::value || sample_scale ||
                                        args.grad_pixel_stride * static_cast<int64_t>(sizeof(T)) % 512 == 0);
  const bool copied_once = copies && !chunks.many(parallel.num_threads) &&
                           extent.pixels * g_stride * static_cast<int64_t>(sizeof(T)) <= kMostCopied;
  const bool da_from_copy = copied_once && need_da && !sample_scale;
  const bool own_rows = Same<S, T>::value ? copies && !copied_once : !copied_once || sample_scale;
  double *dshifts, *dscales, *dsamples;
  T *products, *g_all, *g_groups;
  Carver shared;
  for (int round = 0; round < 2; ++round) {
    if (round) shared = {static_cast<char*>(scratch(kSlotShared, shared.used)), 0};
    dshifts = shared.take<double>(chunks.count * c_hidden);
    dscales = shared.take<double>(chunks.count * c_hidden);
    dsamples = shared.take<double>(need_sample ? chunks.count * args.batch * units : 0);
    products = shared.take<T>(need_products && !direct ? chunks.count * channels * product_stride : 0);
    g_all = shared.take<T>(copied_once ? extent.pixels * g_stride : 0);
    g_groups = shared.take<T>(copied_once ? extent.pixels * channels : 0);
  }
  if (copied_once) {
    parallel_for(parallel, extent.pixels, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        copy_rows<S, T>(grad + p * args.grad_pixel_stride, 0, 1, channels,
                        sample_scale ? sample_scale + p / area : static_cast<const T*>(nullptr), g_all + p * g_stride,
                        0);
      }
      const RowGroups groups(channels, kDenseRows);
      for (int64_t i = 0; i < groups.count; ++i) {
        const int64_t first = groups.first(i), rows = groups.rows(i);
        kGather<T>.rows[rows](g_all + begin * g_stride + first, g_stride, end - begin,
                              g_groups + first * extent.pixels + begin * rows);
      }
    });
  }
  share_chunks(parallel, chunks, c_hidden, kColumnUnit, kPieceUnits, [&](int64_t chunk, int64_t n0, int64_t n1) {
    // Blocks of nearly equal size.
    const int64_t block = round_up(ceil_div(n1 - n0, ceil_div(n1 - n0, most)), kWideColumns);
    T *packed, *da, *a, *g_rows, *factor, *own;
    Carver carver;
    for (int round = 0; round < 2; ++round) {
      if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
      packed = carver.take<T>(w ? packed_elements(most, channels, sizeof(T)) : 0);
      da = carver.take<T>(tiling.max_pixels() * hidden_stride);
      a = carver.take<T>(need_products || need_sample ? tiling.max_pixels() * hidden_stride : 0);
      g_rows = carver.take<T>(own_rows ? tiling.max_pixels() * g_stride : 0);
      factor = carver.take<T>(sample_scale ? tiling.max_pixels() : 0);
      own = carver.take<T>(need_products && direct ? channels * hidden_stride : 0);
    }
    if (need_products) clear(a, tiling.max_pixels() * hidden_stride);
    double *const dshift = dshifts + chunk * c_hidden, *const dscale = dscales + chunk * c_hidden;
    for (int64_t h = n0; h < n1; ++h) dshift[h] = dscale[h] = 0;
    double* const dsample = dsamples + chunk * args.batch * units;
    for (int64_t b = 0; need_sample && b < args.batch; ++b) {
      for (int64_t u = n0 / kColumnUnit; u < ceil_div(n1, kColumnUnit); ++u) dsample[b * units + u] = 0;
    }
    for (int64_t b0 = n0; b0 < n1; b0 += block) {
      const int64_t columns = clip(b0 + block, n1) - b0;
      T* const product = direct ? own : products + chunk * channels * product_stride + b0;
      const int64_t stride = direct ? hidden_stride : product_stride;
      // The last tile's sums are dw.
      const bool straight =
          dw && direct && Same<S, T>::value && !layer_scale && columns % panel_width<T>() == 0 && extent.pixels > 0;
      // da = g * w_pw2, g scaled by layer_scale through the weights and by sample_scale afterwards.
      if (w && need_da) pack_operand<S, T>(w + b0, 1, c_hidden, columns, channels, nullptr, layer_scale, packed);
      const Packed<T> part(packed, columns, channels);
      for (int64_t i = chunks.begin(chunk); i < chunks.begin(chunk + 1); ++i) {
        const Tiling::Tile t = tiling.tile(i);
        const int64_t pixel = t.pixel(args.width), pixels = t.pixels();
        const S* const grad_tile = grad + pixel * args.grad_pixel_stride;
        const S* const z_tile = z + pixel * args.z_pixel_stride + b0;
        S* const dz_tile = dz ? dz + pixel * c_hidden + b0 : nullptr;
        T* const a_tile = need_products || need_sample ? a : nullptr;
        Ahead ahead;
        if (i + 1 < chunks.begin(chunk + 1)) {
          const int64_t after = tiling.tile(i + 1).pixels();
          ahead.add(da_from_copy ? g_all : nullptr, g_stride, pixel + pixels, after);
          ahead.add(copied_once && (da_from_copy || !need_da) ? nullptr : grad, args.grad_pixel_stride, pixel + pixels,
                    after);
          ahead.add(z, args.z_pixel_stride, pixel + pixels, after);
          ahead.add(dz, c_hidden, pixel + pixels, after);
        }
        if (!w) {
          with_act(args.act, BnActBackwardTile<S, S, T>{grad_tile + b0, args.grad_pixel_stride, z_tile,
                                                        args.z_pixel_stride, pixels, columns, norm.at(b0), nullptr,
                                                        dz_tile, c_hidden, nullptr, 0, dscale + b0, dshift + b0});
          continue;
        }
        for (int64_t p = 0; sample_scale && p < pixels; ++p) factor[p] = sample_scale[(pixel + p) / area];
        const T* const factors = sample_scale ? factor : nullptr;
        if (need_da) {
          Gemm<T> g = {};
          const T* rows = g_rows;
          int64_t row_stride = g_stride;
          if (da_from_copy) {
            rows = g_all + pixel * g_stride;
          } else if constexpr (Same<S, T>::value) {
            rows = grad_tile;
            row_stride = args.grad_pixel_stride;
          } else {
            copy_rows<S, T>(grad_tile, args.grad_pixel_stride, pixels, channels, static_cast<const T*>(nullptr), g_rows,
                            g_stride);
          }
          g.set_a(rows, row_stride, channels, pixels);
          g.b = &part;
          g.n_end = part.n_padded;
          g.c = da;
          g.c_stride = hidden_stride;
          g.ahead = &ahead;
          gemm(g);
          with_act(args.act, BnActBackwardTile<S, T, T>{da, hidden_stride, z_tile, args.z_pixel_stride, pixels, columns,
                                                        norm.at(b0), factors, dz_tile, c_hidden, a_tile, hidden_stride,
                                                        dscale + b0, dshift + b0});
        } else if (need_products) {
          with_act(args.act, BnActTile<S, T, T, true>{z_tile, args.z_pixel_stride, pixels, columns, norm.at(b0), a,
                                                      hidden_stride});
        }
        if (need_sample) {  // the gradient of a sample's factor: sum of a * da over its pixels
          for (int64_t p = 0; p < pixels; ++p) {
            for (int64_t u = 0; u < columns; u += kColumnUnit) {
              double sum = 0;
              for (int64_t j = u; j < clip(u + kColumnUnit, columns); ++j) {
                sum += static_cast<double>(a[p * hidden_stride + j]) * static_cast<double>(da[p * hidden_stride + j]);
              }
              dsample[(pixel + p) / area * units + (b0 + u) / kColumnUnit] += sum;
            }
          }
        }
        if (need_products) {
          Operand<T> g = {g_rows, g_stride};
          if (copied_once) g = {g_groups, 0, extent.pixels, pixel};
          if constexpr (Same<S, T>::value) {
            if (!copies) g = {grad_tile, args.grad_pixel_stride};
          }
          if (copies && !copied_once) {
            copy_rows<S, T>(grad_tile, args.grad_pixel_stride, pixels, channels, factors, g_rows, g_stride);
          }
          Sums<T> sums = {i > chunks.begin(chunk), product, stride, product, stride};
          if constexpr (Same<S, T>::value) {
            if (straight && i + 1 == chunks.begin(chunk + 1)) sums.c = dw + b0, sums.c_stride = c_hidden;
          }
          add_products<T>(g, channels, {a, hidden_stride}, round_up(columns, panel_width<T>()), pixels, sums, &ahead);
        }
      }
      for (int64_t c = 0; dw && direct && !straight && c < channels; ++c) {
        if (extent.pixels == 0) clear(own + c * hidden_stride, columns);
        copy_rows<T, S>(own + c * hidden_stride, 0, 1, columns,
                        layer_scale ? layer_scale + c : static_cast<const T*>(nullptr), dw + c * c_hidden + b0, 0);
      }
    }
  });

  T *const dmean = static_cast<T*>(args.dmean), *const dscale = static_cast<T*>(args.dscale),
           *const dshift = static_cast<T*>(args.dshift);
  for (int64_t h = 0; h < c_hidden; ++h) {
    double shift_sum = 0, scale_sum = 0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      shift_sum += dshifts[chunk * c_hidden + h];
      scale_sum += dscales[chunk * c_hidden + h];
    }
    if (dmean) dmean[h] = static_cast<T>(-shift_sum * static_cast<double>(norm.scale[h]));
    if (dscale) dscale[h] = static_cast<T>(scale_sum);
    if (dshift) dshift[h] = static_cast<T>(shift_sum);
  }
  for (int64_t b = 0; need_sample && b < args.batch; ++b) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      for (int64_t u = 0; u < units; ++u) sum += dsamples[(chunk * args.batch + b) * units + u];
    }
    static_cast<T*>(args.dsample_scale)[b] = static_cast<T>(sum);
  }
  if (!need_products || direct) return;
  parallel_for(parallel, channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      T* const total = products + c * product_stride;
      for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
        const T* const part = total + chunk * channels * product_stride;
        for (int64_t h = 0; h < c_hidden; ++h) total[h] += part[h];
      }
      if (tiling.tiles == 0) {
        for (int64_t h = 0; h < c_hidden; ++h) total[h] = 0;
      }
      if (args.dlayer_scale) {
        double sum = 0;
        for (int64_t h = 0; h < c_hidden; ++h) {
          sum += static_cast<double>(to_compute(w[c * c_hidden + h])) * static_cast<double>(total[h]);
        }
        static_cast<T*>(args.dlayer_scale)[c] = static_cast<T>(sum);
      }
      const T factor = layer_scale ? layer_scale[c] : T(1);
      for (int64_t h = 0; dw && h < c_hidden; ++h) to_storage(total[h] * factor, dw + c * c_hidden + h);
    }
  });
}

// ---- The gradients of the 3x3 convolution ---------------------------------------------------------------------------

// dx[:, :c_partial] = the transposed convolution of du, dy added where there is one, and dweight = sum over pixels of
// du^T times the patches of x. dx and dweight may be null.
template <class S, class T>
struct Conv3x3Gradients {
  const Extent* extent;
  const Chunks* chunks;
  int64_t c_partial;
  WeightView<const S> weight;
  const T* du;
  int64_t du_stride;
  const S* dy;
  int64_t dy_stride;
  S* dx;
  int64_t dx_stride;
  S* dweight;   // in the weight's order
  T* products;  // scratch: each chunk's sums by (output channel, kernel row, column and channel)

  int64_t tap_stride() const { return round_up(3 * c_partial, panel_width<T>()); }
  void take(Carver* carver) { products = carver->take<T>(dweight ? chunks->count * c_partial * 3 * tap_stride() : 0); }
};

template <class S, class T>
void conv3x3_gradients(const Conv3x3Gradients<S, T>& args, const Image<S>& x, const ParallelFor& parallel) {
  const Extent& extent = *args.extent;
  const Tiling& tiling = extent.tiling;
  const Chunks& chunks = *args.chunks;
  const int64_t c_partial = args.c_partial, tap_stride = args.tap_stride(), du_stride = args.du_stride;
  const int64_t height = extent.height, width = extent.width;
  if (args.dx) {
    const Image<T> image = channels_last<T>(args.du, height, width, du_stride);
    conv3x3_all<S, T, T>(image, args.weight, true, extent, parallel,
                         [&](const Tiling::Tile& t, int64_t first, int64_t channels, const T* rows, int64_t stride) {
                           const int64_t pixel = t.pixel(width);
                           for (int64_t p = 0; p < t.pixels(); ++p) {
                             combine<T>(rows + p * stride,
                                        args.dy ? args.dy + (pixel + p) * args.dy_stride + first : nullptr,
                                        args.dx + (pixel + p) * args.dx_stride + first, channels);
                           }
                         });
  }

  if (args.dweight) {
    // In the padded rows of x the patches of neighbouring pixels overlap: one kernel row of a patch is 3 c_partial
    // values in a row, the next pixel's begin c_partial further on. Short rows are copied into one run of pixels.
    const bool copied = tiling.max_columns() < kShortRow;
    const int64_t patch_stride = row_pitch<T>(3 * c_partial);
    share_chunks(parallel, chunks, c_partial, kRowUnit, kPieceTaps, [&](int64_t chunk, int64_t n0, int64_t n1) {
      T *padded, *patches;
      Carver carver;
      for (int round = 0; round < 2; ++round) {
        if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
        padded = carver.take<T>(padded_elements(tiling, c_partial));
        patches = carver.take<T>(copied ? tiling.max_pixels() * patch_stride : 0);
      }
      clear(patches, copied ? tiling.max_pixels() * patch_stride : 0);
      T* const product = args.products + (chunk * c_partial + n0) * 3 * tap_stride;
      clear(product, (n1 - n0) * 3 * tap_stride);
      for (int64_t i = chunks.begin(chunk); i < chunks.begin(chunk + 1); ++i) {
        const Tiling::Tile t = tiling.tile(i);
        const int64_t columns = t.columns(), padded_row = (columns + 2) * c_partial;
        const T* const du_tile = args.du + t.pixel(width) * du_stride + n0;
        load_padded_tile<S, T>(x, c_partial, extent, t, padded);
        for (int64_t tap = 0; tap < 3; ++tap) {
          T* const sum = product + tap * tap_stride;
          for (int64_t row = t.row0; row < t.row1; ++row) {
            const int64_t y = row % height + tap - 1, pixel = (row - t.row0) * columns;
            const bool inside = y >= 0 && y < height;
            const T* const from = padded + (row - t.row0 + (inside ? tap : t.row1 - row + 2)) * padded_row;
            if (copied) {
              copy_rows<T, T>(from, c_partial, columns, 3 * c_partial, static_cast<const T*>(nullptr),
                              patches + pixel * patch_stride, patch_stride);
            } else if (inside) {
              add_products<T>({du_tile + pixel * du_stride, du_stride}, n1 - n0, {from, c_partial}, tap_stride, columns,
                              {true, sum, 3 * tap_stride, sum, 3 * tap_stride});
            }
          }
          if (copied) {
            add_products<T>({du_tile, du_stride}, n1 - n0, {patches, patch_stride}, tap_stride, t.pixels(),
                            {true, sum, 3 * tap_stride, sum, 3 * tap_stride});
          }
        }
      }
    });
    parallel_for(parallel, c_partial, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* const sum = args.products + n * 3 * tap_stride;
        for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
          const T* const part = sum + chunk * c_partial * 3 * tap_stride;
          for (int64_t k = 0; k < 3 * tap_stride; ++k) sum[k] += part[k];
        }
        const WeightView<S> dweight = {args.dweight, c_partial, 9, args.weight.channels_last};
        for (int64_t tap = 0; tap < 9; ++tap) {
          const T* const row = sum + tap / 3 * tap_stride + tap % 3 * c_partial;
          S* const to = dweight.at(n, 0, tap);
          const int64_t stride = dweight.in_stride();
          for (int64_t c = 0; c < c_partial; ++c) to_storage(tiling.tiles ? row[c] : T(0), to + c * stride);
        }
      }
    });
  }
}

// ---- pw_stats_backward ----------------------------------------------------------------------------------------------

// In turn: u again; dw_pw; du, whose untouched channels are dx; and through the 3x3 convolution dx's first channels and
// dw_partial.
template <class S, class T>
void pw_stats_backward_as(const PwStatsBackward& args, const ParallelFor& parallel) {
  const int64_t channels = args.channels, c_partial = args.c_partial, c_out = args.c_out;
  const Extent extent(args.batch, args.height, args.width);
  const Tiling& tiling = extent.tiling;
  const Chunks chunks(tiling.tiles, extent.pixels, channels * c_out);
  const Image<S> x = channels_last<S>(args.x, args.height, args.width, args.x_pixel_stride);
  const WeightView<const S> w_partial = {static_cast<const S*>(args.w_partial), c_partial, 9,
                                         args.w_partial_channels_last};
  const S* const w_pw = static_cast<const S*>(args.w_pw);
  const S* const dy = static_cast<const S*>(args.dy);
  S *const dx = static_cast<S*>(args.dx), *const dw_partial = static_cast<S*>(args.dw_partial),
           *const dw_pw = static_cast<S*>(args.dw_pw);
  const int64_t du_stride = row_pitch<T>(c_partial);
  const bool need_du = dx || dw_partial;
  const int64_t n_du = dx ? channels : c_partial;
  const Share share(extent.pixels, n_du, c_out, parallel.num_threads);
  const int64_t sums_stride = share.sums_stride<T>();
  // In chunks, if threads have equally many.
  const bool fused = dw_pw && need_du && share.tile_by_tile(n_du) &&
                     (chunks.count % parallel.num_threads == 0 || chunks.many(parallel.num_threads));
  // Where threads share du's columns, each reads the gradient of z whole: dw_pw's pass leaves it in rows for them.
  const bool keeps_dz = dw_pw && need_du && share.by_columns;
  const bool direct = chunks.count == 1 && !fused;  // as in act_pw_residual_backward
  const int64_t all_stride = row_pitch<T>(channels), kept_stride = row_pitch<T>(c_out);
  // Where threads share dw_pw's rows each reads u whole: it is put together once, unless it is large.
  const bool whole_u = dw_pw && !fused && !chunks.many(parallel.num_threads) &&
                       extent.pixels * all_stride * static_cast<int64_t>(sizeof(T)) <= kMostCopied;
  const int64_t u_stride = padded_n(c_partial, sizeof(T)), n_all = round_up(channels, panel_width<T>());
  T *u, *u_tiles, *du, *kept_dz, *pw_products;
  TotalGradient<S, T> total = {static_cast<const S*>(args.dz),
                               args.dz_pixel_stride,
                               static_cast<const S*>(args.z),
                               args.z_pixel_stride,
                               static_cast<const T*>(args.mean),
                               nullptr,
                               nullptr};
  Conv3x3Gradients<S, T> through = {&extent, &chunks,   c_partial,  w_partial,
                                    nullptr, du_stride, dy,         args.dy_pixel_stride,
                                    dx,      channels,  dw_partial, nullptr};
  Carver shared;
  for (int round = 0; round < 2; ++round) {
    if (round) shared = {static_cast<char*>(scratch(kSlotShared, shared.used)), 0};
    total.take(&shared, c_out);
    u = shared.take<T>(dw_pw && !fused ? extent.pixels * u_stride : 0);
    u_tiles = shared.take<T>(whole_u ? extent.pixels * n_all : 0);
    du = shared.take<T>(need_du ? extent.pixels * du_stride : 0);
    kept_dz = shared.take<T>(keeps_dz ? extent.pixels * kept_stride : 0);
    pw_products = shared.take<T>(dw_pw && !direct ? chunks.count * c_out * all_stride : 0);
    through.take(&shared);
  }
  through.du = du;
  total.prepare(args.dmean, args.dm2, c_out, extent.pixels);

  // Columns [b0, b1) of du: the first c_partial channels go on through the 3x3 convolution, the others are dx.
  const auto store_du = [&](int64_t pixel, int64_t pixels, int64_t b0, int64_t b1, const T* sums, int64_t stride) {
    const int64_t split = b0 < c_partial ? clip(c_partial, b1) : b0;
    for (int64_t p = 0; p < pixels; ++p) {
      const T* const sum = sums + p * stride;
      T* const partial = du + (pixel + p) * du_stride;
      combine<T>(sum, static_cast<const T*>(nullptr), partial + b0, split - b0);
      if (!dx) continue;
      combine<T>(sum + split - b0, dy ? dy + (pixel + p) * args.dy_pixel_stride + split : nullptr,
                 dx + (pixel + p) * channels + split, b1 - split);
    }
  };
  // u from its convolved channels and those that are x's own.
  const auto load_u = [&](int64_t pixel, int64_t pixels, const T* convolved, int64_t stride, T* rows) {
    copy_rows<T, T>(convolved, stride, pixels, c_partial, static_cast<const T*>(nullptr), rows, all_stride);
    copy_rows<S, T>(x.data + pixel * args.x_pixel_stride + c_partial, args.x_pixel_stride, pixels, channels - c_partial,
                    static_cast<const T*>(nullptr), rows + c_partial, all_stride);
  };
  // Where du's last products go instead of sums, and what joins them: for whole panels on one side of c_partial, which
  // store_du need not copy.
  struct Place {
    T* c;
    int64_t stride;
    const T* residual;
    int64_t residual_stride;
  };
  const auto place_of = [&](int64_t pixel, int64_t b0, int64_t b1) {
    Place to = {};
    if ((b1 - b0) % panel_width<T>() != 0) return to;
    if (b1 <= c_partial) {
      to = {du + pixel * du_stride + b0, du_stride, nullptr, 0};
    } else if constexpr (Same<S, T>::value) {
      if (dx && b0 >= c_partial) {
        to = {dx + pixel * channels + b0, channels, dy ? dy + pixel * args.dy_pixel_stride + b0 : nullptr,
              args.dy_pixel_stride};
      }
    }
    return to;
  };
  // sums (+)= dz * w for columns [k, k + depth) of dz, chunk by chunk of hidden channels.
  const int64_t hidden_chunk = chunk_width<T>(c_out, kHiddenChunk);
  const auto add_du = [&](const T* dz, int64_t dz_stride, int64_t pixels, const Packed<T>& w, int64_t k, int64_t depth,
                          T* sums, int64_t sums_stride, const Place& to, Ahead* ahead) {
    Gemm<T> g = {};
    g.set_a(dz, dz_stride, depth, pixels);
    g.b = &w;
    g.k_begin = k;
    g.n_end = w.n_padded;
    g.c_in = k ? sums : nullptr;
    g.c_in_stride = sums_stride;
    g.c = sums;
    g.c_stride = sums_stride;
    if (to.c && k + depth == c_out) {
      g.c = to.c;
      g.c_stride = to.stride;
      g.residual = to.residual;
      g.residual_stride = to.residual_stride;
    }
    g.ahead = ahead;
    gemm(g);
  };
  // What the tile after tile i touches.
  const auto ahead_of = [&](int64_t i, int64_t end) {
    Ahead ahead;
    if (i + 1 < end) {
      const Tiling::Tile t = tiling.tile(i + 1);
      const int64_t pixel = t.pixel(args.width), pixels = t.pixels();
      if (keeps_dz) {
        ahead.add(kept_dz, kept_stride, pixel, pixels);
      } else {
        ahead.add(total.dz, total.dz_stride, pixel, pixels);
        ahead.add(total.z, total.z_stride, pixel, pixels);
      }
      ahead.add(fused ? x.data : nullptr, args.x_pixel_stride, pixel, pixels);
      ahead.add(dx ? dy : nullptr, args.dy_pixel_stride, pixel, pixels);
      ahead.add(dx, channels, pixel, pixels);
      ahead.add(du, du_stride, pixel, pixels);
    }
    return ahead;
  };

  if (dw_pw && !fused) {
    int64_t block = 10 * kRowUnit;
    while (block > 5 * kRowUnit && block * channels > kBlockElements) block -= kRowUnit;
    const int64_t dz_stride = row_pitch<T>(block);
    // The last tile's sums are dw_pw, as in act_pw_residual_backward.
    const bool straight = direct && Same<S, T>::value && channels % panel_width<T>() == 0 && extent.pixels > 0;
    conv3x3_rows<S, T>(x, w_partial, extent, u, u_stride, parallel);
    if (whole_u) {
      parallel_for(parallel, extent.pixels, [&](int64_t begin, int64_t end) {
        T* const row = static_cast<T*>(scratch(kSlotTile, all_stride * static_cast<int64_t>(sizeof(T))));
        clear(row, all_stride);
        for (int64_t p = begin; p < end; ++p) {
          load_u(p, 1, u + p * u_stride, u_stride, row);
          for_column_tiles<T>(n_all, [&](int64_t first, int64_t columns) {
            copy_vectors(row + first, 0, 1, columns, u_tiles + first * extent.pixels + p * columns);
          });
        }
      });
    }
    share_chunks(parallel, chunks, c_out, kRowUnit, kPieceRows, [&](int64_t chunk, int64_t n0, int64_t n1) {
      T *dz, *rows, *own;
      Carver carver;
      for (int round = 0; round < 2; ++round) {
        if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
        dz = carver.take<T>(tiling.max_pixels() * dz_stride);
        rows = carver.take<T>(whole_u ? 0 : tiling.max_pixels() * all_stride);
        own = carver.take<T>(direct ? block * all_stride : 0);
      }
      if (!whole_u) clear(rows, tiling.max_pixels() * all_stride);
      const int64_t tile0 = chunks.begin(chunk), tile1 = chunks.begin(chunk + 1);
      for (int64_t b0 = n0; b0 < n1; b0 += block) {
        const int64_t b1 = clip(b0 + block, n1);
        T* const product = direct ? own : pw_products + (chunk * c_out + b0) * all_stride;
        for (int64_t i = tile0; i < tile1; ++i) {
          const Tiling::Tile t = tiling.tile(i);
          const int64_t pixel = t.pixel(args.width), pixels = t.pixels();
          total.tile(pixel, pixels, b0, b1 - b0, dz, dz_stride);
          if (keeps_dz) {  // copied: total.tile writes whole vectors, beyond b1 into another thread's columns
            copy_rows<T, T>(dz, dz_stride, pixels, b1 - b0, static_cast<const T*>(nullptr),
                            kept_dz + pixel * kept_stride + b0, kept_stride);
          }
          Ahead ahead;
          Operand<T> all_of_u = {rows, all_stride};
          if (whole_u) {
            const Tiling::Tile next = tiling.tile(i + 1 < tile1 ? i + 1 : tile0);
            for_column_tiles<T>(n_all, [&](int64_t first, int64_t columns) {
              ahead.add(u_tiles + first * extent.pixels, columns, next.pixel(args.width), next.pixels());
            });
            all_of_u = {u_tiles, 0, extent.pixels, pixel};
          } else {
            load_u(pixel, pixels, u + pixel * u_stride, u_stride, rows);
          }
          Sums<T> sums = {i > tile0, product, all_stride, product, all_stride};
          if constexpr (Same<S, T>::value) {
            if (straight && i + 1 == tile1) sums.c = dw_pw + b0 * channels, sums.c_stride = channels;
          }
          add_products<T>({dz, dz_stride}, b1 - b0, all_of_u, n_all, pixels, sums, &ahead);
        }
        if (direct && !straight) {
          if (extent.pixels == 0) clear(own, (b1 - b0) * all_stride);
          copy_rows<T, S>(own, all_stride, b1 - b0, channels, static_cast<const T*>(nullptr), dw_pw + b0 * channels,
                          channels);
        }
      }
    });
  }

  if (fused) {
    // Many pixels: each tile's gradient of z is made once, for du and for dw_pw.
    const int64_t dz_stride = row_pitch<T>(c_out);
    parallel_pieces(parallel, chunks.count, 1, [&](int64_t begin, int64_t end, bool packed_already) {
      T *packed_partial, *packed, *dz, *sums, *rows;
      PConvTile<S, T> pconv(nullptr, c_partial);
      Carver carver;
      for (int round = 0; round < 2; ++round) {
        if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
        packed_partial = carver.take<T>(packed_elements(3 * c_partial, 3 * c_partial, sizeof(T)));
        pconv.carve(&carver, x, tiling);
        packed = carver.take<T>(packed_elements(n_du, c_out, sizeof(T)));
        dz = carver.take<T>(tiling.max_pixels() * dz_stride);
        sums = carver.take<T>(tiling.max_pixels() * sums_stride);
        rows = carver.take<T>(tiling.max_pixels() * all_stride);
      }
      if (!packed_already) {
        clear(rows, tiling.max_pixels() * all_stride);
        pack_conv3x3(w_partial, false, 0, c_partial, packed_partial);
        pack_operand<S, T>(w_pw, 1, channels, n_du, c_out, nullptr, nullptr, packed);
      }
      pconv.w.data = packed_partial;
      const Packed<T> pw(packed, n_du, c_out);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        for (int64_t i = chunks.begin(chunk); i < chunks.begin(chunk + 1); ++i) {
          const Tiling::Tile t = tiling.tile(i);
          const int64_t pixel = t.pixel(args.width), pixels = t.pixels();
          Ahead ahead = ahead_of(i, chunks.begin(chunk + 1));
          total.tile(pixel, pixels, 0, c_out, dz, dz_stride);
          for (int64_t k = 0; k < c_out; k += hidden_chunk) {
            add_du(dz + k, dz_stride, pixels, pw, k, clip(hidden_chunk, c_out - k), sums, sums_stride, {}, &ahead);
          }
          store_du(pixel, pixels, 0, n_du, sums, sums_stride);
          pconv.run(x, extent.height, extent.width, t, extent.rows, nullptr, &ahead);
          load_u(pixel, pixels, pconv.u, pconv.u_stride, rows);
          T* const product = pw_products + chunk * c_out * all_stride;
          add_products<T>({dz, dz_stride}, c_out, {rows, all_stride}, round_up(channels, panel_width<T>()), pixels,
                          {i > chunks.begin(chunk), product, all_stride, product, all_stride}, &ahead);
        }
      }
    });
  } else if (need_du) {
    const int64_t dz_stride = row_pitch<T>(hidden_chunk);
    share_out(parallel, share, tiling.tiles, n_du,
              [&](int64_t tile0, int64_t tile1, int64_t n0, int64_t n1, bool packed_already) {
                T *packed, *dz, *sums;
                Carver carver;
                for (int round = 0; round < 2; ++round) {
                  if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
                  packed = carver.take<T>(packed_elements(share.block, c_out, sizeof(T)));
                  dz = carver.take<T>(keeps_dz ? 0 : tiling.max_pixels() * dz_stride);
                  sums = carver.take<T>(tiling.max_pixels() * sums_stride);
                }
                for (int64_t b0 = n0; b0 < n1; b0 += share.block) {
                  const int64_t b1 = clip(b0 + share.block, n1);
                  if (!packed_already)
                    pack_operand<S, T>(w_pw + b0, 1, channels, b1 - b0, c_out, nullptr, nullptr, packed);
                  const Packed<T> part(packed, b1 - b0, c_out);
                  for (int64_t i = tile0; i < tile1; ++i) {
                    const Tiling::Tile t = tiling.tile(i);
                    const int64_t pixel = t.pixel(args.width), pixels = t.pixels();
                    const Place to = place_of(pixel, b0, b1);
                    Ahead ahead = ahead_of(i, tile1);
                    for (int64_t k = 0; k < c_out; k += hidden_chunk) {
                      const int64_t depth = clip(hidden_chunk, c_out - k);
                      if (keeps_dz) {
                        add_du(kept_dz + pixel * kept_stride + k, kept_stride, pixels, part, k, depth, sums,
                               sums_stride, to, &ahead);
                      } else {
                        total.tile(pixel, pixels, k, depth, dz, dz_stride);
                        add_du(dz, dz_stride, pixels, part, k, depth, sums, sums_stride, to, &ahead);
                      }
                    }
                    if (!to.c) store_du(pixel, pixels, b0, b1, sums, sums_stride);
                  }
                }
              });
  }
  if (dw_pw && !direct) {
    parallel_for(parallel, c_out, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* const sum = pw_products + n * all_stride;
        for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
          const T* const part = sum + chunk * c_out * all_stride;
          for (int64_t c = 0; c < channels; ++c) sum[c] += part[c];
        }
        for (int64_t c = 0; c < channels; ++c) to_storage(tiling.tiles ? sum[c] : T(0), dw_pw + n * channels + c);
      }
    });
  }
  conv3x3_gradients<S, T>(through, x, parallel);
}

// ---- pconv3x3_backward ----------------------------------------------------------------------------------------------

template <class S, class T>
void pconv3x3_backward_as(const PConv3x3Backward& args, const ParallelFor& parallel) {
  const int64_t channels = args.channels, c_partial = args.c_partial;
  const Extent extent(args.batch, args.height, args.width);
  const Chunks chunks(extent.tiling.tiles, extent.pixels, 9 * c_partial * c_partial);
  const S* const grad = static_cast<const S*>(args.grad);
  S* const dx = static_cast<S*>(args.dx);
  const int64_t du_stride = row_pitch<T>(c_partial);
  Conv3x3Gradients<S, T> gradients = {&extent,
                                      &chunks,
                                      c_partial,
                                      {static_cast<const S*>(args.weight), c_partial, 9, args.weight_channels_last},
                                      nullptr,
                                      du_stride,
                                      nullptr,
                                      0,
                                      dx,
                                      channels,
                                      static_cast<S*>(args.dweight),
                                      nullptr};
  T* du;
  Carver shared;
  for (int round = 0; round < 2; ++round) {
    if (round) shared = {static_cast<char*>(scratch(kSlotShared, shared.used)), 0};
    du = shared.take<T>(extent.pixels * du_stride);
    gradients.take(&shared);
  }
  gradients.du = du;
  parallel_for(parallel, ceil_div(extent.pixels, kSumRows), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kSumRows, rows = clip(end * kSumRows, extent.pixels) - first;
    const S* const from = grad + first * args.grad_pixel_stride;
    copy_rows<S, T>(from, args.grad_pixel_stride, rows, c_partial, static_cast<const T*>(nullptr),
                    du + first * du_stride, du_stride);
    if (dx) {
      copy_channels<S>(from + c_partial, 1, args.grad_pixel_stride, dx + first * channels + c_partial, 1, channels,
                       rows, channels - c_partial);
    }
  });
  conv3x3_gradients<S, T>(gradients, channels_last<S>(args.x, args.height, args.width, args.x_pixel_stride), parallel);
}

// ---- patch_stats ----------------------------------------------------------------------------------------------------

template <class S, class T>
void patch_stats_as(const PatchStats& args, const ParallelFor& parallel) {
  const PatchConv& conv = args.conv;
  const Extent extent(conv.batch, conv.height / conv.kh, conv.width / conv.kw);
  const Tiling& tiling = extent.tiling;
  Statistics statistics;
  Carver shared;
  for (int round = 0; round < 2; ++round) {
    if (round) shared = {static_cast<char*>(scratch(kSlotShared, shared.used)), 0};
    statistics.take(&shared, tiling.tiles, conv.c_out);
  }
  const auto finish = [&](int64_t i) {
    const Tiling::Tile t = tiling.tile(i);
    const S* const y = static_cast<const S*>(conv.y) + t.pixel(extent.width) * conv.y_pixel_stride;
    statistics.add<T>(i, y, conv.y_pixel_stride, t.pixels(), 0, conv.c_out);
  };
  parallel_for(parallel, tiling.tiles, [&](int64_t begin, int64_t end) {
    patch_conv_tiles<S, T>(conv, tiling, begin, end, 0, padded_n(conv.c_out, sizeof(T)), finish);
  });
  statistics.combine_tiles<T>(tiling, args.mean, args.m2, parallel);
}

// ---- patch_conv_backward --------------------------------------------------------------------------------------------

// Patches are rows of K = (kernel row, kernel column, channel), as in patch_conv. With P = sum over pixels of
// grad^T * patches, dweight = scale * P and dscale = sum over K of weight * P.
template <class S, class T>
void patch_conv_backward_as(const PatchConvBackward& args, const ParallelFor& parallel) {
  const int64_t channels = args.channels, c_out = args.c_out, taps = args.kh * args.kw;
  const int64_t run = args.kw * channels, depth = args.kh * run;
  const int64_t out_height = args.height / args.kh, out_width = args.width / args.kw;
  const Extent extent(args.batch, out_height, out_width);
  const Tiling& tiling = extent.tiling;
  const Chunks chunks(tiling.tiles, extent.pixels, c_out * depth);
  const Image<S> x = image<S>(args.x, args.x_stride);
  const WeightView<const S> weight = {static_cast<const S*>(args.weight), channels, taps, args.weight_channels_last};
  TotalGradient<S, T> total = {static_cast<const S*>(args.grad),
                               args.grad_pixel_stride,
                               static_cast<const S*>(args.y),
                               args.y_pixel_stride,
                               static_cast<const T*>(args.mean),
                               nullptr,
                               nullptr};
  const T* const scale = static_cast<const T*>(args.scale);
  S *const dx = static_cast<S*>(args.dx), *const dweight = static_cast<S*>(args.dweight);
  const bool need_products = dweight || args.dscale;
  const int64_t product_stride = round_up(depth, panel_width<T>());
  const bool as_it_is = Same<S, T>::value && args.weight_channels_last;
  const T* in_order = nullptr;  // the weight with its rows in the order of K
  T *copied, *products;         // that, where it is not as it is, and each chunk's P
  double* dshifts;
  Carver shared;
  for (int round = 0; round < 2; ++round) {
    if (round) shared = {static_cast<char*>(scratch(kSlotShared, shared.used)), 0};
    total.take(&shared, c_out);
    copied = shared.take<T>(as_it_is ? 0 : c_out * depth);
    products = shared.take<T>(need_products ? chunks.count * c_out * product_stride : 0);
    dshifts = shared.take<double>(args.dshift ? chunks.count * c_out : 0);
  }
  total.prepare(args.dmean, args.dm2, c_out, extent.pixels);
  if constexpr (Same<S, T>::value) {
    if (as_it_is) in_order = weight.data;
  }
  if (!in_order && (dx || args.dscale)) {
    parallel_for(parallel, c_out, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          T* const to = copied + n * depth + tap * channels;
          for (int64_t c = 0; c < channels; ++c) to[c] = to_compute(*weight.at(n, c, tap));
        }
      }
    });
    in_order = copied;
  }

  if (dx) {
    const bool rest = out_height * args.kh != args.height || out_width * args.kw != args.width;
    if (rest || tiling.tiles == 0) {
      parallel_for(parallel, args.batch * args.height, [&](int64_t begin, int64_t end) {
        const int64_t row = args.width * channels;
        __builtin_memset(dx + begin * row, 0, static_cast<size_t>((end - begin) * row) * sizeof(S));
      });
    }
    const Share share(extent.pixels, depth, c_out, parallel.num_threads);
    const int64_t g_stride = row_pitch<T>(c_out), sums_stride = share.sums_stride<T>();
    share_out(parallel, share, tiling.tiles, depth,
              [&](int64_t tile0, int64_t tile1, int64_t n0, int64_t n1, bool packed_already) {
                T *packed, *g_rows, *sums;
                Carver carver;
                for (int round = 0; round < 2; ++round) {
                  if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
                  packed = carver.take<T>(packed_elements(share.block, c_out, sizeof(T)));
                  g_rows = carver.take<T>(tiling.max_pixels() * g_stride);
                  sums = carver.take<T>(tiling.max_pixels() * sums_stride);
                }
                for (int64_t b0 = n0; b0 < n1; b0 += share.block) {
                  const int64_t b1 = clip(b0 + share.block, n1);
                  if (!packed_already)
                    pack_operand<T, T>(in_order + b0, 1, depth, b1 - b0, c_out, nullptr, scale, packed);
                  const Packed<T> part(packed, b1 - b0, c_out);
                  for (int64_t i = tile0; i < tile1; ++i) {
                    const Tiling::Tile t = tiling.tile(i);
                    total.tile(t.pixel(out_width), t.pixels(), 0, c_out, g_rows, g_stride);
                    Gemm<T> g = {};
                    g.set_a(g_rows, g_stride, c_out, t.pixels());
                    g.b = &part;
                    g.n_end = part.n_padded;
                    g.c = sums;
                    g.c_stride = sums_stride;
                    Ahead ahead;
                    if (i + 1 < tile1) {
                      const Tiling::Tile next = tiling.tile(i + 1);
                      ahead.add(total.dz, total.dz_stride, next.pixel(out_width), next.pixels());
                      ahead.add(total.z, total.z_stride, next.pixel(out_width), next.pixels());
                      if (next.columns() == out_width) {
                        ahead.add(dx, channels,
                                  next.row0 / out_height * args.height * args.width +
                                      next.row0 % out_height * args.kh * args.width,
                                  (next.row1 - next.row0) * args.kh * args.width);
                      }
                    }
                    g.ahead = &ahead;
                    gemm(g);
                    const T* sum = sums;
                    for (int64_t row = t.row0; row < t.row1; ++row) {
                      for (int64_t column = t.column0; column < t.column1; ++column, sum += sums_stride) {
                        for (int64_t dy = b0 / run; dy * run < b1; ++dy) {
                          const int64_t from = dy * run > b0 ? dy * run : b0, to = clip((dy + 1) * run, b1);
                          const int64_t y = row / out_height * args.height + row % out_height * args.kh + dy;
                          combine<T>(sum + from - b0, static_cast<const T*>(nullptr),
                                     dx + (y * args.width + column * args.kw) * channels + from - dy * run, to - from);
                        }
                      }
                    }
                  }
                }
              });
  }

  if (need_products || args.dshift) {
    const bool in_runs = (x.channel_stride == 1 || channels == 1) && x.pixel_stride == channels;
    const int64_t g_stride = row_pitch<T>(c_out), patch_stride = row_pitch<T>(depth);
    share_chunks(parallel, chunks, c_out, kRowUnit, kPieceRows, [&](int64_t chunk, int64_t n0, int64_t n1) {
      T *g_rows, *patches;
      Carver carver;
      for (int round = 0; round < 2; ++round) {
        if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
        g_rows = carver.take<T>(tiling.max_pixels() * g_stride);
        patches = carver.take<T>(tiling.max_pixels() * patch_stride);
      }
      clear(patches, tiling.max_pixels() * patch_stride);
      double* const dshift = dshifts + chunk * c_out;
      for (int64_t n = n0; args.dshift && n < n1; ++n) dshift[n] = 0;
      for (int64_t i = chunks.begin(chunk); i < chunks.begin(chunk + 1); ++i) {
        const Tiling::Tile t = tiling.tile(i);
        total.tile(t.pixel(out_width), t.pixels(), n0, n1 - n0, g_rows, g_stride);
        for (int64_t p = 0; args.dshift && p < t.pixels(); ++p) {
          for (int64_t n = n0; n < n1; ++n) dshift[n] += g_rows[p * g_stride + n - n0];
        }
        if (!need_products) continue;
        Ahead ahead;
        if (i + 1 < chunks.begin(chunk + 1)) {
          const Tiling::Tile next = tiling.tile(i + 1);
          ahead.add(total.dz, total.dz_stride, next.pixel(out_width), next.pixels());
          ahead.add(total.z, total.z_stride, next.pixel(out_width), next.pixels());
          if (in_runs && next.columns() == out_width) {
            ahead.add(x.at(next.row0 / out_height, next.row0 % out_height * args.kh, 0), channels, 0,
                      (next.row1 - next.row0) * args.kh * args.width);
          }
        }
        if (in_runs) {
          T* patch = patches;
          for (int64_t row = t.row0; row < t.row1; ++row) {
            for (int64_t column = t.column0; column < t.column1; ++column, patch += patch_stride) {
              for (int64_t dy = 0; dy < args.kh; ++dy) {
                combine<T>(x.at(row / out_height, row % out_height * args.kh + dy, column * args.kw),
                           static_cast<const T*>(nullptr), patch + dy * run, run);
              }
            }
          }
        } else {
          load_patches(x, t, out_height, args.kh, args.kw, channels, patch_stride, patches);
        }
        T* const product = products + (chunk * c_out + n0) * product_stride;
        add_products<T>({g_rows, g_stride}, n1 - n0, {patches, patch_stride}, product_stride, t.pixels(),
                        {i > chunks.begin(chunk), product, product_stride, product, product_stride}, &ahead);
      }
    });
  }
  for (int64_t n = 0; args.dshift && n < c_out; ++n) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) sum += dshifts[chunk * c_out + n];
    static_cast<T*>(args.dshift)[n] = static_cast<T>(sum);
  }
  if (!need_products) return;
  parallel_for(parallel, c_out, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      T* const sums = products + n * product_stride;
      if (tiling.tiles == 0) clear(sums, depth);
      for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
        const T* const part = sums + chunk * c_out * product_stride;
        for (int64_t k = 0; k < depth; ++k) sums[k] += part[k];
      }
      if (args.dscale) {
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) {
          sum += static_cast<double>(in_order[n * depth + k]) * static_cast<double>(sums[k]);
        }
        static_cast<T*>(args.dscale)[n] = static_cast<T>(sum);
      }
      const T factor = scale ? scale[n] : T(1);
      if (!dweight) continue;
      const WeightView<S> to = {dweight, channels, taps, args.weight_channels_last};
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < channels; ++c) to_storage(sums[tap * channels + c] * factor, to.at(n, c, tap));
      }
    }
  });
}

// ---- The table ------------------------------------------------------------------------------------------------------

void pw_stats(const PwStats& args, const ParallelFor& parallel) {
  by_dtype<PwStats>(args.dtype, args, parallel, pw_stats_as<float, float>, pw_stats_as<double, double>,
                    pw_stats_as<bf16, float>);
}
void pw_stats_backward(const PwStatsBackward& args, const ParallelFor& parallel) {
  by_dtype<PwStatsBackward>(args.dtype, args, parallel, pw_stats_backward_as<float, float>,
                            pw_stats_backward_as<double, double>, pw_stats_backward_as<bf16, float>);
}
void bn_act(const BnAct& args, const ParallelFor& parallel) {
  by_dtype<BnAct>(args.dtype, args, parallel, bn_act_as<float, float>, bn_act_as<double, double>,
                  bn_act_as<bf16, float>);
}
void act_pw_residual(const ActPwResidual& args, const ParallelFor& parallel) {
  const bool wide = args.residual_dtype == DType::kFloat32;
  by_dtype<ActPwResidual>(args.dtype, args, parallel, act_pw_residual_as<float, float, float>,
                          act_pw_residual_as<double, double, double>,
                          wide ? act_pw_residual_as<bf16, float, float> : act_pw_residual_as<bf16, bf16, float>);
}
void act_pw_residual_backward(const ActPwResidualBackward& args, const ParallelFor& parallel) {
  by_dtype<ActPwResidualBackward>(args.dtype, args, parallel, act_pw_residual_backward_as<float, float>,
                                  act_pw_residual_backward_as<double, double>,
                                  act_pw_residual_backward_as<bf16, float>);
}
void pconv3x3_backward(const PConv3x3Backward& args, const ParallelFor& parallel) {
  by_dtype<PConv3x3Backward>(args.dtype, args, parallel, pconv3x3_backward_as<float, float>,
                             pconv3x3_backward_as<double, double>, pconv3x3_backward_as<bf16, float>);
}
void patch_stats(const PatchStats& args, const ParallelFor& parallel) {
  by_dtype<PatchStats>(args.conv.dtype, args, parallel, patch_stats_as<float, float>, patch_stats_as<double, double>,
                       patch_stats_as<bf16, float>);
}
void patch_conv_backward(const PatchConvBackward& args, const ParallelFor& parallel) {
  by_dtype<PatchConvBackward>(args.dtype, args, parallel, patch_conv_backward_as<float, float>,
                              patch_conv_backward_as<double, double>, patch_conv_backward_as<bf16, float>);
}
