// What fused.cu is written in, for two compilers: NVRTC (GPUs) and the system's C++ compiler
// (CPUs). compiler.py puts it in front of fused.cu and says with -D what these are: scalar_t (of
// tensors), real_t (of arithmetic), INDEX and LANES.

typedef INDEX index_t;
typedef unsigned char byte_t;
#ifdef __CUDACC_RTC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define INLINE __device__ __forceinline__
#define ENTRY extern "C" __global__ void
#define UNROLL _Pragma("unroll")
// Threads of a block: x for groups of LANES channels, y for rows. Its neighbours read neighbours.
#define ROWS(row)                                                                       \
    for (index_t row = index_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows;      \
         row += gridDim.y * blockDim.y)
#define CHANNELS(channel)                                                               \
    if (const index_t channel = LANES * (index_t(blockIdx.x) * blockDim.x + threadIdx.x); \
        channel < channels)
#define EACH(row, channel) CHANNELS(channel) ROWS(row)
// A channel for a column of threads, the first of which writes what they find together.
#define COLUMNS(channel)                                                                \
    if (const index_t channel = index_t(blockIdx.x) * blockDim.x + threadIdx.x; true)
#define WRITES(channel) (threadIdx.y == 0 && channel < channels)
INLINE float reciprocal(float x) { return __fdividef(1.0f, x); }  // of x >= 1, to 2 ulp
INLINE double root(double x) { return sqrt(x); }
#else
#define INLINE static inline __attribute__((always_inline))
#define ENTRY extern "C" void
#define UNROLL _Pragma("GCC unroll 64")
#define ROWS(row) _Pragma("omp parallel for") for (index_t row = 0; row < rows; ++row)
#define CHANNELS(channel) \
    _Pragma("omp simd") for (index_t channel = 0; channel < channels; ++channel)
#define EACH(row, channel) ROWS(row) CHANNELS(channel)
#define COLUMNS(channel) CHANNELS(channel)
#define WRITES(channel) true
extern "C" __attribute__((const, simd("notinbranch"))) float expf(float);
extern "C" __attribute__((const, simd("notinbranch"))) double exp(double);
INLINE float reciprocal(float x) { return 1 / x; }
INLINE double root(double x) { return __builtin_sqrt(x); }
enum class bfloat16 : unsigned short {};  // a number to the compiler: a struct does not vectorise
INLINE float real(bfloat16 x) { return __builtin_bit_cast(float, unsigned(x) << 16); }
INLINE void set(bfloat16& place, float x) {
    const unsigned word = __builtin_bit_cast(unsigned, x);
    place = bfloat16((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
#endif
INLINE float exponential(float x) { return expf(x); }
INLINE double exponential(double x) { return exp(x); }
INLINE double reciprocal(double x) { return 1 / x; }
INLINE real_t absolute(real_t x) { return x < 0 ? -x : x; }

// Between the types of memory and of arithmetic.
template <class Scalar>
INLINE real_t real(const Scalar& x) { return real_t(x); }
template <class Scalar>
INLINE void set(Scalar& place, real_t x) { place = Scalar(x); }

// LANES neighbouring channels, one load or store of a GPU.
struct alignas(sizeof(scalar_t) * LANES) Pack {
    scalar_t lane[LANES];
};
struct alignas(LANES) Bytes {
    byte_t lane[LANES];
};
#ifdef __CUDACC_RTC__
INLINE Pack load(const scalar_t* place) { return *reinterpret_cast<const Pack*>(place); }
INLINE Bytes load(const byte_t* place) { return *reinterpret_cast<const Bytes*>(place); }
INLINE void store(scalar_t* place, const Pack& pack) { *reinterpret_cast<Pack*>(place) = pack; }
INLINE void store(byte_t* place, const Bytes& bytes) { *reinterpret_cast<Bytes*>(place) = bytes; }
#else
INLINE Pack load(const scalar_t* place) { return {*place}; }
INLINE Bytes load(const byte_t* place) { return {*place}; }
INLINE void store(scalar_t* place, const Pack& pack) { *place = pack.lane[0]; }
INLINE void store(byte_t* place, const Bytes& bytes) { *place = bytes.lane[0]; }
#endif
#define EACH_LANE(k) UNROLL for (int k = 0; k < LANES; ++k)
INLINE index_t clamp(index_t i, index_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// COUNT sums, two or three, of each channel and part of the rows: partial is [parts, COUNT,
// channels]. `body`, the last argument, adds row r, channel c to sums[0], sums[1], ...
#ifdef __CUDACC_RTC__
#define THREADS 256
template <int COUNT>
INLINE void write_sums(const real_t (&sums)[COUNT][LANES], index_t channels, real_t* partial) {
    __shared__ real_t shared[COUNT][THREADS * LANES];
    const int columns = blockDim.x * LANES, thread = threadIdx.y * blockDim.x + threadIdx.x;
    UNROLL for (int s = 0; s < COUNT; ++s) EACH_LANE(k) shared[s][thread * LANES + k] = sums[s][k];
    __syncthreads();
    for (int i = thread; i < COUNT * columns; i += blockDim.x * blockDim.y) {
        const int s = i / columns, column = i % columns;
        const index_t c = index_t(blockIdx.x) * columns + column;
        real_t sum = 0;
        for (int row = 0; row < blockDim.y; ++row) sum += shared[s][row * columns + column];
        if (c < channels) partial[(index_t(blockIdx.y) * COUNT + s) * channels + c] = sum;
    }
}
#define SUMS_OF_ROWS(COUNT, r, c, ...)                      \
    real_t sums[COUNT][LANES];                              \
    for (int s = 0; s < COUNT; ++s) EACH_LANE(k) sums[s][k] = 0; \
    EACH(r, c) __VA_ARGS__                                  \
    write_sums(sums, channels, partial);
#else
#define SUMS_OF_ROWS(COUNT, r, c, ...)                                                       \
    _Pragma("omp parallel for") for (index_t part = 0; part < parts; ++part) {               \
        real_t* start = partial + part * COUNT * channels;                                   \
        for (index_t i = 0; i < COUNT * channels; ++i) start[i] = 0;                         \
        for (index_t r = part * rows / parts; r < (part + 1) * rows / parts; ++r)            \
            CHANNELS(c) {                                                                    \
                real_t* const sums[] = {start + c, start + channels + c,                     \
                                        start + (COUNT - 1) * channels + c};                 \
                __VA_ARGS__                                                                  \
            }                                                                                \
    }
#endif
