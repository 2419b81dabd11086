// The kernels of layer.cpp, in the words of portable.cuh. compiler.py says with -D what STEPS and
// CHARGE are, and writes derivative(x, alpha), the surrogate of a spike's, in front. Tensors are in
// memory rows of channels.

// The neuron -------------------------------------------------------------------------------------

#define NONE 0        // none: "spikes" are the input, and their gradient is the input's
#define DIVIDE 1      // LIF: rate is tau
#define MULTIPLY 2    // LIF where 1 / tau, the rate, has no rounding error
#define PARAMETRIC 3  // PLIF: a rate for each channel
#define INTEGRATE 4   // IF
#define NEURON_SUMS (CHARGE == PARAMETRIC ? 3 : 2)

INLINE real_t charge(real_t v, real_t x, real_t rate) {
    if (CHARGE == NONE) return x;
    if (CHARGE == INTEGRATE) return v + x;
    return v + (CHARGE == DIVIDE ? (x - v) / rate : (x - v) * rate);
}

INLINE real_t to_input(real_t grad_h, real_t rate) {
    if (CHARGE == NONE || CHARGE == INTEGRATE) return grad_h;
    return CHARGE == DIVIDE ? grad_h / rate : grad_h * rate;
}

INLINE real_t rate_of(const real_t* rates, int k, real_t rate) {
    return CHARGE == PARAMETRIC ? rates[k] : rate;
}

// LANES neurons, the first of them i of n, with scale, shift and rates of these. The input at step
// t is scale * y[t * step + i] + shift; step is 0 for an image shown STEPS times.
template <bool BYTES>
INLINE void fire_some(index_t i, index_t n, index_t step, const scalar_t* y, scalar_t* spikes,
                      byte_t* bytes, const real_t* scale, const real_t* shift,
                      const real_t* rates, real_t rate, real_t threshold) {
    Pack input[STEPS];  // all read before the first is written: y may be spikes
    UNROLL for (int t = 0; t < STEPS; ++t) input[t] = load(y + t * step + i);
    Pack output[STEPS];
    Bytes small[STEPS];
    EACH_LANE(k) {
        const real_t own = rate_of(rates, k, rate);
        real_t v = 0;
        UNROLL for (int t = 0; t < STEPS; ++t) {
            const real_t h = charge(v, scale[k] * real(input[t].lane[k]) + shift[k], own);
            const bool fired = h >= threshold;
            set(output[t].lane[k], CHARGE == NONE ? h : fired ? 1 : 0);
            small[t].lane[k] = fired;
            v = fired ? 0 : h;
        }
    }
    UNROLL for (int t = 0; t < STEPS; ++t) {
        store(spikes + t * n + i, output[t]);
        if (BYTES) store(bytes + t * n + i, small[t]);
    }
}

// `grad` is that of scale * y + shift. Adds its sum to `total`, that of its product with y - mean
// to `dot`, and the gradient of PLIF's rate to `slope`.
INLINE void fire_backward_some(index_t i, index_t n, index_t step, const scalar_t* y,
                               const scalar_t* grad_spikes, scalar_t* grad, const real_t* scale,
                               const real_t* shift, const real_t* mean, const real_t* rates,
                               real_t rate, real_t threshold, real_t alpha, real_t* total,
                               real_t* dot, real_t* slope) {
    Pack input[STEPS], upstream[STEPS];
    UNROLL for (int t = 0; t < STEPS; ++t) {
        input[t] = load(y + t * step + i);
        upstream[t] = load(grad_spikes + t * n + i);
    }
    Pack output[STEPS];
    EACH_LANE(k) {
        const real_t own = rate_of(rates, k, rate);
        real_t h[STEPS];
        real_t v = 0, grad_v = 0, sum = 0, product = 0;
        UNROLL for (int t = 0; t < STEPS; ++t) {
            h[t] = charge(v, scale[k] * real(input[t].lane[k]) + shift[k], own);
            v = h[t] >= threshold ? 0 : h[t];
        }
        UNROLL for (int t = STEPS - 1; t >= 0; --t) {
            if (STEPS > 16) {  // read again: too many to wait in registers
                input[t] = load(y + t * step + i);
                upstream[t] = load(grad_spikes + t * n + i);
            }
            const real_t slope_of_spike = derivative(h[t] - threshold, alpha);
            const real_t kept = h[t] >= threshold ? 0 : grad_v;
            const real_t grad_s = real(upstream[t].lane[k]);
            const real_t grad_h = CHARGE == NONE ? grad_s : grad_s * slope_of_spike + kept;
            const real_t grad_x = to_input(grad_h, own);
            grad_v = CHARGE == INTEGRATE ? grad_h : grad_h - grad_x;
            sum += grad_x;
            set(output[t].lane[k], t == 0 && !step ? sum : grad_x);
            product += grad_x * (real(input[t].lane[k]) - mean[k]);
            if (CHARGE == PARAMETRIC) {
                const real_t before = t == 0 || h[t - 1] >= threshold ? 0 : h[t - 1];
                const real_t x = scale[k] * real(input[t].lane[k]) + shift[k];
                slope[k] += grad_h * (x - before);
            }
        }
        total[k] += sum;
        dot[k] += product;
    }
    UNROLL for (int t = 0; t < STEPS; ++t)
        if (CHARGE != NONE && (t == 0 || step)) store(grad + t * step + i, output[t]);
}

// `norm` is [5, channels], see batch_norm. `bytes` are the spikes again, or null.
ENTRY fire(index_t rows, index_t channels, index_t step, const scalar_t* y, scalar_t* spikes,
           byte_t* bytes, const real_t* __restrict__ norm, const real_t* __restrict__ rates,
           real_t rate, real_t threshold) {
    const index_t n = rows * channels;
    const real_t *scale = norm + 3 * channels, *shift = scale + channels;
    if (bytes) {
        EACH(r, c) fire_some<true>(r * channels + c, n, step, y, spikes, bytes, scale + c,
                                   shift + c, rates + c, rate, threshold);
    } else {
        EACH(r, c) fire_some<false>(r * channels + c, n, step, y, spikes, bytes, scale + c,
                                    shift + c, rates + c, rate, threshold);
    }
}

ENTRY fire_backward(index_t rows, index_t channels, index_t parts, index_t step, const scalar_t* y,
                    const scalar_t* grad_spikes, scalar_t* grad, const real_t* __restrict__ norm,
                    const real_t* __restrict__ rates, real_t rate, real_t threshold, real_t alpha,
                    real_t* partial) {
    const index_t n = rows * channels;
    const real_t *scale = norm + 3 * channels, *shift = scale + channels;
    SUMS_OF_ROWS(NEURON_SUMS, r, c, {
        fire_backward_some(r * channels + c, n, step, y, grad_spikes, grad, scale + c, shift + c,
                           norm + c, rates + c, rate, threshold, alpha, sums[0], sums[1],
                           sums[NEURON_SUMS - 1]);
    })
}

// BatchNorm --------------------------------------------------------------------------------------

// Sums of y - y[0] and of its square: a variance from the values themselves would lose its digits
// where the mean is large.
ENTRY statistics(index_t rows, index_t channels, index_t parts, const scalar_t* y,
                 real_t* partial) {
    SUMS_OF_ROWS(2, r, c, {
        const Pack value = load(y + r * channels + c);
        EACH_LANE(k) {
            const real_t d = real(value.lane[k]) - real(y[c + k]);
            sums[0][k] += d;
            sums[1][k] += d * d;
        }
    })
}

// The sum over parts of what starts at `place`.
INLINE double sum_of_parts(const real_t* place, index_t stride, index_t parts) {
    double sum = 0;
#ifdef __CUDACC_RTC__
    __shared__ double shared[16][33];
    for (index_t part = threadIdx.y; part < parts; part += 16) sum += place[part * stride];
    __syncthreads();
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (int row = 0; row < 16; ++row) sum += shared[row][threadIdx.x];
#else
    for (index_t part = 0; part < parts; ++part) sum += place[part * stride];
#endif
    return sum;
}

// From `statistics` of count rows to norm [5, all]: mean, unbiased variance, 1 / standard
// deviation, scale and shift, of a BatchNorm whose channels begin at `start`. Running statistics
// and the number of batches, if they are not null, move on as BatchNorm moves them; `bias`, or
// null, is the convolution's, which y lacks.
ENTRY batch_norm(index_t channels, index_t all, index_t start, index_t parts, index_t count,
                 index_t repeats, real_t eps, real_t momentum, const scalar_t* y,
                 const real_t* partial, const real_t* gamma, const real_t* beta,
                 const real_t* bias, real_t* norm, real_t* running_mean, real_t* running_var,
                 long long* batches) {
    y += start, partial += start, norm += start;
    COLUMNS(i) {
        const index_t c = clamp(i, channels);
        const double difference = sum_of_parts(partial + c, 2 * all, parts) / count;
        const double squares = sum_of_parts(partial + all + c, 2 * all, parts) / count;
        const double variance = squares - difference * difference, n = double(count) * repeats;
        const real_t mean = real(y[c]) + difference, var = variance < 0 ? 0 : variance;
        const real_t invstd = 1 / root(double(var) + eps), scale = gamma[c] * invstd;
        if (WRITES(i)) {
            const real_t unbiased = var * (n / (n - 1)), now = bias ? mean + bias[c] : mean;
            norm[c] = mean;
            norm[all + c] = unbiased;
            norm[2 * all + c] = invstd;
            norm[3 * all + c] = scale;
            norm[4 * all + c] = beta[c] - mean * scale;
            if (batches) {
                running_mean[c] += momentum * (now - running_mean[c]);
                running_var[c] += momentum * (unbiased - running_var[c]);
                if (c == 0) ++*batches;
            }
        }
    }
}

// As above, from running statistics; only scale and shift.
ENTRY running_norm(index_t channels, index_t all, index_t start, real_t eps, const real_t* mean,
                   const real_t* var, const real_t* bias, const real_t* gamma, const real_t* beta,
                   real_t* norm) {
    real_t *scales = norm + 3 * all + start, *shifts = scales + all;
    COLUMNS(c) {
        if (WRITES(c)) {
            const real_t scale = gamma[c] / root(double(var[c]) + eps);
            scales[c] = scale;
            shifts[c] = beta[c] - (bias ? mean[c] - bias[c] : mean[c]) * scale;
        }
    }
}

// From sums over count rows to out [7, channels]: the gradients of beta, gamma and PLIF's rate,
// factors a, b, c, with which BatchNorm's own gradient is a * grad + b * y + c, and zeros.
ENTRY batch_norm_backward(index_t channels, index_t parts, index_t sums, index_t count,
                          const real_t* partial, const real_t* norm, real_t* out) {
    const real_t *mean = norm, *invstd = norm + 2 * channels, *scale = invstd + channels;
    COLUMNS(i) {
        const index_t c = clamp(i, channels), stride = sums * channels;
        const double total = sum_of_parts(partial + c, stride, parts);
        const double dot = sum_of_parts(partial + channels + c, stride, parts);
        const double slope =
            sums < 3 ? 0 : sum_of_parts(partial + 2 * channels + c, stride, parts);
        const double a = scale[c], b = -a * invstd[c] * invstd[c] * dot / count;
        if (WRITES(i)) {
            out[c] = total;
            out[channels + c] = dot * invstd[c];
            out[2 * channels + c] = slope;
            out[3 * channels + c] = a;
            out[4 * channels + c] = b;
            out[5 * channels + c] = -a * total / count - b * mean[c];
            out[6 * channels + c] = 0;
        }
    }
}

// The gradient of y into out, which may be grad; `sums` are those of batch_norm_backward.
ENTRY normalise_backward(index_t rows, index_t channels, const scalar_t* y, const scalar_t* grad,
                         scalar_t* out, const real_t* __restrict__ sums) {
    const real_t *a = sums + 3 * channels, *b = a + channels, *shift = b + channels;
    EACH(r, c) {
        const Pack value = load(y + r * channels + c);
        Pack upstream = load(grad + r * channels + c);
        EACH_LANE(k) {
            const real_t scaled = a[c + k] * real(upstream.lane[k]);
            const real_t x = b[c + k] * real(value.lane[k]) + shift[c + k];
            set(upstream.lane[k], scaled + x);
        }
        store(out + r * channels + c, upstream);
    }
}

// Max-pooling, 3x3 with stride 2 and padding 1 ---------------------------------------------------

// LANES channels of a window, whose nine pixels begin at `pixel`, into `largest` and, with TAPS,
// which of them it is, the first of equals.
template <bool TAPS>
INLINE void pool_some(const scalar_t* const (&pixel)[9], const int (&tap)[9], index_t c,
                      const real_t* scale, scalar_t* largest, byte_t* taps) {
    Pack value = load(pixel[0] + c);
    Bytes which;
    real_t best[LANES];
    EACH_LANE(k) {
        best[k] = (scale[c + k] < 0 ? -1 : 1) * real(value.lane[k]);
        which.lane[k] = tap[0];
    }
    UNROLL for (int j = 1; j < 9; ++j) {
        const Pack next = load(pixel[j] + c);
        EACH_LANE(k) {
            const real_t x = (scale[c + k] < 0 ? -1 : 1) * real(next.lane[k]);
            const bool larger = x > best[k] || x != x;
            best[k] = larger ? x : best[k];
            if (TAPS) which.lane[k] = larger ? tap[j] : which.lane[k];
        }
    }
    EACH_LANE(k) set(value.lane[k], (scale[c + k] < 0 ? -1 : 1) * best[k]);
    store(largest + c, value);
    if (TAPS) store(taps + c, which);
}

// Of y in front of BatchNorm, what would be the largest of a window behind it: where BatchNorm's
// scale is negative, the smallest. With `taps` null there are values alone.
ENTRY pool(index_t rows, index_t channels, index_t height, index_t width, const scalar_t* y,
           const real_t* __restrict__ norm, scalar_t* pooled, byte_t* taps) {
    const real_t* scale = norm + 3 * channels;
    const index_t out_height = (height + 1) / 2, out_width = (width + 1) / 2;
    ROWS(r) {
        const index_t ow = r % out_width, oh = r / out_width % out_height;
        const index_t n = r / out_width / out_height;
        const scalar_t* pixel[9];
        int tap[9];
        UNROLL for (int j = 0; j < 9; ++j) {  // outside of y, the nearest pixel: the window has it
            const index_t h = clamp(2 * oh - 1 + j / 3, height);
            const index_t w = clamp(2 * ow - 1 + j % 3, width);
            pixel[j] = y + ((n * height + h) * width + w) * channels;
            tap[j] = (h - 2 * oh + 1) * 3 + w - 2 * ow + 1;
        }
        scalar_t* largest = pooled + r * channels;
        if (taps) {
            CHANNELS(c) pool_some<true>(pixel, tap, c, scale, largest, taps + r * channels);
        } else {
            CHANNELS(c) pool_some<false>(pixel, tap, c, scale, largest, taps);
        }
    }
}

// normalise_backward of a gradient that comes through max-pooling: a pixel is in one to four
// windows.
ENTRY pool_backward(index_t rows, index_t channels, index_t height, index_t width,
                    const scalar_t* y, const scalar_t* grad_pooled, const byte_t* taps,
                    scalar_t* grad, const real_t* __restrict__ sums) {
    const real_t *a = sums + 3 * channels, *b = a + channels, *shift = b + channels;
    const index_t out_height = (height + 1) / 2, out_width = (width + 1) / 2;
    ROWS(r) {
        const index_t w = r % width, h = r / width % height, n = r / width / height;
        index_t window[4];
        int tap[4];
        UNROLL for (int j = 0; j < 4; ++j) {
            const index_t oh = h / 2 + j / 2, ow = w / 2 + j % 2;
            const bool near = j / 2 <= h % 2 && j % 2 <= w % 2;
            const bool inside = near && oh < out_height && ow < out_width;
            window[j] = inside ? ((n * out_height + oh) * out_width + ow) * channels : 0;
            tap[j] = inside ? (h - 2 * oh + 1) * 3 + w - 2 * ow + 1 : 255;
        }
        CHANNELS(c) {
            real_t sum[LANES];
            EACH_LANE(k) sum[k] = 0;
            UNROLL for (int j = 0; j < 4; ++j) {
                const Bytes which = load(taps + window[j] + c);
                const Pack upstream = load(grad_pooled + window[j] + c);
                EACH_LANE(k) sum[k] += which.lane[k] == tap[j] ? real(upstream.lane[k]) : 0;
            }
            Pack value = load(y + r * channels + c);
            EACH_LANE(k) {
                const real_t x = b[c + k] * real(value.lane[k]) + shift[c + k];
                set(value.lane[k], a[c + k] * sum[k] + x);
            }
            store(grad + r * channels + c, value);
        }
    }
}
