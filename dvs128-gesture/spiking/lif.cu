// The kernels of cupy_lif.py: a thread per neuron, the loop over T in the kernel, the membrane in a
// float32 register. They are compiled for one type and one kind of neuron at a time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

enum { LIF, IF, PLIF };

// The potential before firing. `leak` is tau of a LIF neuron, and sigmoid(w) of a PLIF neuron.
template <int kind>
__device__ float charge(float v, float x, float leak) {
    return kind == IF ? v + x : kind == LIF ? v + (x - v) / leak : v + (x - v) * leak;
}

// Neuron i of n reads x[t * x_step + i]; x_step is n, or 0 for an input that stays the same.
template <typename scalar_t, int kind>
__global__ void lif_forward(long long n, long long T, long long x_step, const scalar_t* x,
                            const float* rate, scalar_t* spikes, float tau, float v_threshold) {
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float leak = kind == PLIF ? *rate : tau;
    float v = 0.0f;
    for (long long t = 0; t < T; ++t) {
        const float h = charge<kind>(v, static_cast<float>(x[t * x_step + i]), leak);
        const bool fired = h >= v_threshold;
        spikes[t * n + i] = static_cast<scalar_t>(fired ? 1.0f : 0.0f);
        v = fired ? 0.0f : h;
    }
}

// h is computed again from x, CHUNK steps at a time so that it stays in registers. The last chunk
// comes first. Each chunk starts by integrating the steps before it. There are none where
// T <= CHUNK, as for every neuron over T of a published recipe; over T*B there are many.
// grad_rate[i] is the gradient of *rate through neuron i alone: no atomics, the same sum each time.
template <typename scalar_t, int kind>
__global__ void lif_backward(long long n, long long T, long long x_step, const scalar_t* x,
                             const float* rate, const scalar_t* grad_spikes, scalar_t* grad_x,
                             float* grad_rate, float tau, float v_threshold, float alpha) {
    const int CHUNK = 16;
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float leak = kind == PLIF ? *rate : tau;
    const float kept = kind == IF ? 1.0f : kind == LIF ? 1.0f - 1.0f / leak : 1.0f - leak;
    float grad_v = 0.0f, sum = 0.0f;
    for (long long begin = (T - 1) / CHUNK * CHUNK; begin >= 0; begin -= CHUNK) {
        float h[CHUNK];
        float v = 0.0f;
        for (long long t = 0; t < begin; ++t) {
            v = charge<kind>(v, static_cast<float>(x[t * x_step + i]), leak);
            v = v >= v_threshold ? 0.0f : v;
        }
        const float start = v;
#pragma unroll
        for (int k = 0; k < CHUNK; ++k) {
            if (begin + k < T) {
                h[k] = charge<kind>(v, static_cast<float>(x[(begin + k) * x_step + i]), leak);
                v = h[k] >= v_threshold ? 0.0f : h[k];
            }
        }
#pragma unroll
        for (int k = CHUNK - 1; k >= 0; --k) {
            if (begin + k < T) {
                const long long j = (begin + k) * n + i;
                const float g = 1.0f / (1.0f + expf(-alpha * (h[k] - v_threshold)));
                float grad_h = static_cast<float>(grad_spikes[j]) * (alpha * g * (1.0f - g));
                grad_h += h[k] >= v_threshold ? 0.0f : grad_v;
                if (kind == PLIF) {
                    const float before = k == 0 ? start : h[k - 1] >= v_threshold ? 0.0f : h[k - 1];
                    sum += grad_h * (static_cast<float>(x[(begin + k) * x_step + i]) - before);
                }
                float grad = grad_h;
                if (kind != IF) grad = kind == LIF ? grad_h / leak : grad_h * leak;
                grad_x[j] = static_cast<scalar_t>(grad);
                grad_v = grad_h * kept;
            }
        }
    }
    if (kind == PLIF) grad_rate[i] = sum;
}
