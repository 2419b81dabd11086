// The kernels of fused.py, for two compilers: NVRTC (GPUs) and the system's C++ compiler (CPUs). fused.py says with -D
// what scalar_t (tensors), real_t (arithmetic), STEPS and PARTS are. Tensors are in memory rows of channels.

#ifdef __CUDACC_RTC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define INLINE __device__ __forceinline__
#define ENTRY extern "C" __global__
#define ROWS(row)                                                                                                      \
    for (index_t row = index_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y)
#define CHANNELS(channel)                                                                                              \
    if (const index_t channel = index_t(blockIdx.x) * blockDim.x + threadIdx.x; channel < channels)
#else
#define ROWS(row) _Pragma("omp parallel for") for (index_t row = 0; row < rows; ++row)
#define CHANNELS(channel) _Pragma("omp simd") for (index_t channel = 0; channel < channels; ++channel)
#define INLINE static inline __attribute__((always_inline))
#define ENTRY extern "C"
extern "C" __attribute__((const, simd("notinbranch"))) float expf(float);
extern "C" __attribute__((const, simd("notinbranch"))) double exp(double);
struct __nv_bfloat16 {
    unsigned short bits;
    explicit __nv_bfloat16(float value) {
        const unsigned word = __builtin_bit_cast(unsigned, value);
        bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
    operator float() const { return __builtin_bit_cast(float, unsigned(bits) << 16); }
};
#endif
#define EACH(row, channel) ROWS(row) CHANNELS(channel)
typedef long long index_t;
INLINE float exponential(float x) { return expf(x); }
INLINE double exponential(double x) { return exp(x); }
INLINE void store(scalar_t* place, real_t value) { *place = scalar_t(value); }  // inlined, bfloat16 vectorises
INLINE index_t clamp(index_t i, index_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// Neuron i of n. Its input at step t is scale * y[t * step + i] + shift; step is 0 for an image shown STEPS times.
INLINE void fire_one(index_t i, index_t n, index_t step, const scalar_t* y, scalar_t* spikes, real_t scale,
                     real_t shift, real_t tau, real_t threshold) {
    real_t v = 0;
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
        const real_t h = v + (scale * real_t(y[t * step + i]) + shift - v) / tau;
        const bool fired = h >= threshold;
        spikes[t * n + i] = scalar_t(fired ? 1.0f : 0.0f);
        v = fired ? 0 : h;
    }
}

// grad is that of scale * y + shift. Adds its sum to `total`, that of its product with y - mean to `dot`.
INLINE void fire_backward_one(index_t i, index_t n, index_t step, const scalar_t* y, const scalar_t* grad_spikes,
                              scalar_t* grad, real_t scale, real_t shift, real_t mean, real_t tau, real_t threshold,
                              real_t alpha, real_t& total, real_t& dot) {
    real_t h[STEPS];
    real_t v = 0, grad_v = 0, sum = 0, product = 0;
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
        h[t] = v + (scale * real_t(y[t * step + i]) + shift - v) / tau;
        v = h[t] >= threshold ? 0 : h[t];
    }
#pragma unroll
    for (int t = STEPS - 1; t >= 0; --t) {
        const real_t g = 1 / (1 + exponential(-alpha * (h[t] - threshold)));
        const real_t kept = h[t] >= threshold ? 0 : grad_v;
        const real_t grad_h = real_t(grad_spikes[t * n + i]) * (alpha * g * (1 - g)) + kept;
        const real_t grad_x = grad_h / tau;
        grad_v = grad_h - grad_x;
        if (step) grad[t * step + i] = scalar_t(grad_x);
        sum += grad_x;
        product += grad_x * (real_t(y[t * step + i]) - mean);
    }
    if (!step) grad[i] = scalar_t(sum);
    total += sum;
    dot += product;
}

ENTRY void fire(index_t rows, index_t channels, index_t step, const scalar_t* y, scalar_t* spikes,
                const real_t* scale, const real_t* shift, real_t tau, real_t threshold) {
    EACH(r, c) fire_one(r * channels + c, rows * channels, step, y, spikes, scale[c], shift[c], tau, threshold);
}

// partial is [PARTS, 2, channels]: `total` and `dot` over some of the rows each.
ENTRY void fire_backward(index_t rows, index_t channels, index_t step, const scalar_t* y, const scalar_t* grad_spikes,
                         scalar_t* grad, const real_t* scale, const real_t* shift, const real_t* mean,
                         real_t* partial, real_t tau, real_t threshold, real_t alpha) {
#ifdef __CUDACC_RTC__
    __shared__ real_t sums[2][8][32];  // TILE, transposed
    const index_t c = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
    real_t total = 0, dot = 0;
    EACH(r, c) fire_backward_one(r * channels + c, rows * channels, step, y, grad_spikes, grad, scale[c], shift[c],
                                 mean[c], tau, threshold, alpha, total, dot);
    sums[0][threadIdx.y][threadIdx.x] = total;
    sums[1][threadIdx.y][threadIdx.x] = dot;
    __syncthreads();
    if (threadIdx.y < 2 && c < channels) {
        real_t sum = 0;
        for (int k = 0; k < 8; ++k) sum += sums[threadIdx.y][k][threadIdx.x];
        partial[(blockIdx.y * 2 + threadIdx.y) * channels + c] = sum;
    }
#else
#pragma omp parallel for
    for (index_t part = 0; part < PARTS; ++part) {
        real_t* total = partial + part * 2 * channels;
        real_t* dot = total + channels;
        for (index_t c = 0; c < 2 * channels; ++c) total[c] = 0;
        for (index_t r = part * rows / PARTS; r < (part + 1) * rows / PARTS; ++r)
#pragma omp simd
            for (index_t c = 0; c < channels; ++c)
                fire_backward_one(r * channels + c, rows * channels, step, y, grad_spikes, grad, scale[c], shift[c],
                                  mean[c], tau, threshold, alpha, total[c], dot[c]);
    }
#endif
}

#ifndef __CUDACC_RTC__
// Sums of y - pivot and of its square, per part. PyTorch's own for channels_last add up whole columns in float32.
ENTRY void statistics(index_t rows, index_t channels, const scalar_t* y, const real_t* pivot, real_t* partial) {
#pragma omp parallel for
    for (index_t part = 0; part < PARTS; ++part) {
        real_t* total = partial + part * 2 * channels;
        real_t* squares = total + channels;
        for (index_t c = 0; c < 2 * channels; ++c) total[c] = 0;
        for (index_t r = part * rows / PARTS; r < (part + 1) * rows / PARTS; ++r)
#pragma omp simd
            for (index_t c = 0; c < channels; ++c) {
                const real_t d = real_t(y[r * channels + c]) - pivot[c];
                total[c] += d;
                squares[c] += d * d;
            }
    }
}
#endif

// The rest of BatchNorm's backward pass, in place: grad becomes that of y.
ENTRY void normalise_backward(index_t rows, index_t channels, const scalar_t* y, scalar_t* grad, const real_t* a,
                              const real_t* b, const real_t* c) {
    EACH(r, k) {
        const index_t i = r * channels + k;
        store(grad + i, a[k] * real_t(grad[i]) + b[k] * real_t(y[i]) + c[k]);
    }
}

// Max-pooling, 3x3 with stride 2 and padding 1. A tap is which of a window's nine is the largest, the first of equals.
ENTRY void pool(index_t rows, index_t channels, index_t height, index_t width, const scalar_t* y, scalar_t* pooled,
                unsigned char* taps) {
    const index_t out_height = (height + 1) / 2, out_width = (width + 1) / 2;
    ROWS(r) {
        const index_t n = r / (out_width * out_height), oh = r / out_width % out_height, ow = r % out_width;
        const scalar_t* pixel[9];
        int tap[9];
#pragma unroll
        for (int k = 0; k < 9; ++k) {  // outside of y the nearest pixel stands in, which the window has anyway
            const index_t h = clamp(2 * oh - 1 + k / 3, height), w = clamp(2 * ow - 1 + k % 3, width);
            pixel[k] = y + ((n * height + h) * width + w) * channels;
            tap[k] = (h - 2 * oh + 1) * 3 + w - 2 * ow + 1;
        }
        CHANNELS(c) {
            real_t best = pixel[0][c];
            int which = tap[0];
#pragma unroll
            for (int k = 1; k < 9; ++k) {
                const real_t value = real_t(pixel[k][c]);
                const bool larger = value > best || value != value;
                best = larger ? value : best;
                which = larger ? tap[k] : which;
            }
            store(pooled + r * channels + c, best);
            taps[r * channels + c] = which;
        }
    }
}

// normalise_backward of a gradient that comes through max-pooling: a pixel is in one to four windows.
ENTRY void pool_backward(index_t rows, index_t channels, index_t height, index_t width, const scalar_t* y,
                         const scalar_t* grad_pooled, const unsigned char* taps, scalar_t* grad, const real_t* a,
                         const real_t* b, const real_t* c) {
    const index_t out_height = (height + 1) / 2, out_width = (width + 1) / 2;
    ROWS(r) {
        const index_t n = r / (width * height), h = r / width % height, w = r % width;
        index_t window[4];
        int tap[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const index_t oh = h / 2 + j / 2, ow = w / 2 + j % 2;
            const bool inside = j / 2 <= h % 2 && j % 2 <= w % 2 && oh < out_height && ow < out_width;
            window[j] = inside ? ((n * out_height + oh) * out_width + ow) * channels : 0;
            tap[j] = inside ? (h - 2 * oh + 1) * 3 + w - 2 * ow + 1 : -1;
        }
        CHANNELS(k) {
            real_t sum = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                sum += taps[window[j] + k] == tap[j] ? real_t(grad_pooled[window[j] + k]) : 0;
            const index_t i = r * channels + k;
            store(grad + i, a[k] * sum + b[k] * real_t(y[i]) + c[k]);
        }
    }
}
