// Convolutions of spikes on a CPU: rows of the weight are added up, only where an input is not 0.
//
// Where inputs are not 0 is known from bits, in words of 64: a row of pixels after the other, of a
// pixel all channels. An output pixel sees a patch of depth = taps * channels inputs, whose words
// are put together from those of the rows. Of some words at a time they become Events, and
// `add_rows` keeps a tile of outputs in registers while it adds the rows of the weight that these
// name. The weight's gradient is the same sum with pixels and depth exchanged: the words are
// transposed, and rows of the output's gradient are added up. Each output has its sum in one order,
// whatever the batch and the threads.
//
// Values that are not 1 count as they are, so that any input is right; a dense one takes longer.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

typedef uint64_t word;
typedef scalar_t real;
typedef unsigned char byte;
#define UNROLL _Pragma("GCC unroll 16")
#if defined(__AVX512F__)
constexpr int LANES = 64 / sizeof(real);
#elif defined(__AVX__)
constexpr int LANES = 32 / sizeof(real);
#else
constexpr int LANES = 16 / sizeof(real);
#endif
typedef real vec __attribute__((vector_size(LANES * sizeof(real))));
constexpr int MOST_VECTORS = 8;  // of a tile, in registers
// Words whose bits a tile has rows for: it has 64 kB, to stay in a near cache.
constexpr int WORDS = (1 << 16) / (64 * MOST_VECTORS * sizeof(vec));
constexpr int PIXELS = 128;  // that are summed before the next tile

struct Shape {
    long images, height, width, channels, out_height, out_width, out_channels;
    long kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x;
};

// Bits -------------------------------------------------------------------------------------------

// Of 64 inputs: bits of those that are not 0, and of those that are 1.
struct Found {
    word some, ones;
};

template <class In>
static Found look(const In* x) {
    byte some[64], ones[64];
    for (int k = 0; k < 64; ++k) some[k] = x[k] != 0, ones[k] = x[k] == 1;
    Found found = {0, 0};
    for (int k = 0; k < 64; k += 8) {  // eight bytes, 0 or 1, to eight bits
        word eight[2];
        memcpy(eight, some + k, 8);
        memcpy(eight + 1, ones + k, 8);
        found.some |= (eight[0] * 0x0102040810204080 >> 56) << k;
        found.ones |= (eight[1] * 0x0102040810204080 >> 56) << k;
    }
    return found;
}

// Bits of the places of x that are not 0: x is `rows` of `size` numbers, each of which begins a word.
// Returns how many these are, or minus that where one of them is not 1.
template <class In>
static long find(long rows, long size, const In* x, word* bits) {
    const long words = (size + 63) / 64;
    long count = 0, ones = 0;
    _Pragma("omp parallel for reduction(+ : count, ones)") for (long r = 0; r < rows; ++r)
        for (long i = 0; i < words; ++i) {
            const In* place = x + r * size + 64 * i;
            In rest[64] = {};
            if (size - 64 * i < 64) {
                memcpy(rest, place, (size - 64 * i) * sizeof(In));
                place = rest;
            }
            const Found found = look(place);
            bits[r * words + i] = found.some;
            count += __builtin_popcountll(found.some);
            ones += __builtin_popcountll(found.ones);
        }
    return ones < count ? -count : count;
}

static void transpose(word* square) {  // of 64 x 64 bits
    word mask = 0xffffffff;
    for (int j = 32; j; j >>= 1, mask ^= mask << j)
        for (int high = 0; high < 64; high += 2 * j)
            for (int k = high; k < high + j; ++k) {
                const word swapped = (square[k] >> j ^ square[k + j]) & mask;
                square[k] ^= swapped << j;
                square[k + j] ^= swapped;
            }
}

// Patches ----------------------------------------------------------------------------------------

struct Corner {  // of a patch, in its image; it may be outside
    long image, y, x;
};

struct Patches {
    const Shape shape;
    const word* bits;
    const long depth, words, of_row;  // words of a patch, and of a row of pixels
    std::vector<long> place;          // of each input, from the corner on

    Patches(const Shape& s, const word* bits)
        : shape(s), bits(bits), depth(s.kernel_height * s.kernel_width * s.channels),
          words((depth + 63) / 64), of_row((s.width * s.channels + 63) / 64), place(words * 64) {
        for (long k = 0; k < long(place.size()); ++k) {  // behind the depth, too
            const long tap = k / s.channels, y = tap / s.kernel_width, x = tap % s.kernel_width;
            place[k] = (y * s.width + x) * s.channels + k % s.channels;
        }
    }
    long pixels() const { return shape.images * shape.out_height * shape.out_width; }
    Corner corner(long pixel) const {
        const long x = pixel % shape.out_width, y = pixel / shape.out_width % shape.out_height;
        return {pixel / shape.out_width / shape.out_height, y * shape.stride_y - shape.pad_y,
                x * shape.stride_x - shape.pad_x};
    }
    void move_on(Corner& corner) const {  // to the next pixel's
        corner.x += shape.stride_x;
        if (corner.x + shape.pad_x < shape.out_width * shape.stride_x) return;
        corner.x = -shape.pad_x;
        corner.y += shape.stride_y;
        if (corner.y + shape.pad_y < shape.out_height * shape.stride_y) return;
        corner.y = -shape.pad_y;
        ++corner.image;
    }
    long start(const Corner& corner) const {
        return ((corner.image * shape.height + corner.y) * shape.width + corner.x) * shape.channels;
    }
    // The bits of a patch, one row's behind the other's.
    void cut(const Corner& corner, word* out) const {
        word current = 0;
        long filled = 0;
        const auto append = [&](word some, long count) {  // of at most 64 bits; the others are 0
            const long left = 64 - filled;
            current |= some << filled;
            filled += count;
            if (count < left) return;
            *out++ = current;
            current = left < 64 ? some >> left : 0;
            filled -= 64;
        };
        const long width = shape.width * shape.channels, size = shape.kernel_width * shape.channels;
        const long begin = corner.x * shape.channels, stop = begin + size;
        const long first = std::clamp(0L, begin, stop), end = std::clamp(width, begin, stop);
        for (long y = corner.y; y < corner.y + shape.kernel_height; ++y) {
            const bool inside = y >= 0 && y < shape.height;
            const word* row = bits + (corner.image * shape.height + y) * of_row;
            for (long i = begin, count; i < stop; i += count) {
                const bool outside = !inside || i < first || i >= end;
                count = std::min(64L, (i < first ? first : i < end ? end : stop) - i);
                word some = 0;
                if (!outside) {
                    some = row[i / 64] >> i % 64;
                    if (i % 64 && count > 64 - i % 64) some |= row[i / 64 + 1] << (64 - i % 64);
                    if (count < 64) some &= (word(1) << count) - 1;
                }
                append(some, count);
            }
        }
        if (filled) *out = current;
    }
};

// Sums -------------------------------------------------------------------------------------------

// Writes `first` plus the places of the bits, and up to 32 numbers of no meaning behind; returns how
// many there are. No branch depends on the bits: it would be guessed wrong as often as not.
typedef uint16_t eight __attribute__((vector_size(16)));

static const struct Places {  // of the bits of each byte
    eight of[256];
    Places() : of() {
        for (int byte = 0; byte < 256; ++byte)
            for (int bit = 0, n = 0; bit < 8; ++bit)
                if (byte >> bit & 1) of[byte][n++] = bit;
    }
} places;

static int write_places(word bits, int first, uint16_t* out) {
    const uint16_t* start = out;
    for (int k = 0; k < 64; k += 8, bits >>= 8) {
        const eight found = places.of[bits & 255] + uint16_t(first + k);
        memcpy(out, &found, sizeof found);
        out += __builtin_popcount(bits & 255);
    }
    return out - start;
}

// Which rows of a tile a row of outputs adds up, and with what values, where these are not all 1.
template <class In>
struct Events {
    static constexpr bool ones = std::is_void<In>();
    static constexpr int MOST = 64 * WORDS + 32;  // of a row, with room for what has no meaning
    const In* x;
    std::vector<int> count;
    std::vector<uint16_t> row;
    std::vector<real> value;

    Events(const In* x, int rows)
        : x(x), count(rows), row(rows * MOST), value(ones ? 0 : rows * MOST) {}
    // Append the bits of a word, whose values are those of x + place + places[bit].
    void add(int r, int first, word bits, long place, const long* places) {
        uint16_t* rows = row.data() + r * MOST;
        const int begin = count[r];
        count[r] += write_places(bits, first, rows + begin);
        if constexpr (!ones) {
            real* values = value.data() + r * MOST;
            for (int n = begin; n < count[r]; ++n)
                values[n] = x[place + places[rows[n] - first]];
        }
    }
    void clear() { std::fill(count.begin(), count.end(), 0); }
};

// Adds to each of `rows` outputs the rows of `tile` that its events name. A row of the tile has V
// vectors, one of outputs `width` numbers.
template <int V, class In>
static void add_rows(int rows, const Events<In>& events, const real* tile, real* out, long stride,
                     int width, bool first) {
    for (int r = 0; r < rows; ++r, out += stride) {
        const uint16_t* row = events.row.data() + r * events.MOST;
        const real* value = events.value.data() + r * events.MOST;
        const int count = events.count[r];
        if (!count && !first) continue;
        vec sum[V], narrow[V];
        const bool whole = width == V * LANES;
        UNROLL for (int j = 0; j < V; ++j) sum[j] = vec{};
        if (!first && whole) {
            UNROLL for (int j = 0; j < V; ++j) memcpy(sum + j, out + j * LANES, sizeof(vec));
        } else if (!first) {
            memcpy(narrow, out, width * sizeof(real));
            UNROLL for (int j = 0; j < V; ++j) sum[j] = narrow[j];
        }
        for (int i = 0; i < count; ++i) {
            const vec* from = (const vec*)tile + row[i] * V;
            if constexpr (events.ones) {
                UNROLL for (int j = 0; j < V; ++j) sum[j] += from[j];
            } else {
                UNROLL for (int j = 0; j < V; ++j) sum[j] += value[i] * from[j];
            }
        }
        if (whole) {
            UNROLL for (int j = 0; j < V; ++j) memcpy(out + j * LANES, sum + j, sizeof(vec));
        } else {
            UNROLL for (int j = 0; j < V; ++j) narrow[j] = sum[j];
            memcpy(out, narrow, width * sizeof(real));
        }
    }
}

template <class In>
static auto adder(int vectors) {
    return vectors == 1 ? add_rows<1, In> : vectors == 2 ? add_rows<2, In>
         : vectors == 3 ? add_rows<3, In> : vectors == 4 ? add_rows<4, In>
         : vectors == 6 ? add_rows<6, In> : add_rows<8, In>;
}

struct Tiles {  // of `channels` outputs, all but the last of the same width
    const long channels, all = (channels + LANES - 1) / LANES;
    const long count = (all + MOST_VECTORS - 1) / MOST_VECTORS;
    const long used = (all + count - 1) / count * LANES;  // numbers of a tile
    const int vectors = used < 4 * LANES ? used / LANES : (used / LANES + 1) / 2 * 2;
    const long row = vectors * LANES;  // numbers in memory
    int width(long tile) const { return std::min(channels - tile * used, used); }
};

struct Memory {  // for vectors; what is not written has no meaning
    std::unique_ptr<vec[]> vectors;
    Memory(long reals) : vectors(new vec[(reals + LANES - 1) / LANES]) {}
    real* get() { return (real*)vectors.get(); }
};

// Writes `columns` numbers, LANES at most, of `rows` rows as rows.
static void turn(const real* in, long stride, long rows, long columns, real* out, long row) {
    typedef std::conditional_t<sizeof(real) == 4, int, long> whole;
    typedef whole Places __attribute__((vector_size(sizeof(vec))));
    Places low, high;  // of two vectors, the halves that alternate
    for (int i = 0; i < LANES; ++i) {
        low[i] = i / 2 + i % 2 * LANES;
        high[i] = low[i] + LANES / 2;
    }
    for (long begin = 0; begin < rows; begin += LANES, in += LANES * stride, out += LANES) {
        vec from[LANES], to[LANES];
        if (rows - begin < LANES || columns < LANES) {
            for (long k = 0; k < columns; ++k)
                for (long j = 0; j < std::min(rows - begin, long(LANES)); ++j)
                    out[k * row + j] = in[j * stride + k];
            continue;
        }
        UNROLL for (int j = 0; j < LANES; ++j) memcpy(from + j, in + j * stride, sizeof(vec));
        for (int n = 1; n < LANES; n *= 2) {
            UNROLL for (int j = 0; j < LANES / 2; ++j) {
                to[2 * j] = __builtin_shuffle(from[j], from[j + LANES / 2], low);
                to[2 * j + 1] = __builtin_shuffle(from[j], from[j + LANES / 2], high);
            }
            memcpy(from, to, sizeof from);
        }
        UNROLL for (int k = 0; k < LANES; ++k) memcpy(out + k * row, from + k, sizeof(vec));
    }
}

template <class In>
static void convolve(const Patches& patches, const In* x, const real* weight, real* y) {
    const long depth = patches.depth, pixels = patches.pixels(), words = patches.words;
    const Tiles tiles{patches.shape.out_channels};
    const long size = words * 64 * tiles.row;
    Memory packed(tiles.count * size);
    _Pragma("omp parallel for collapse(2)") for (long tile = 0; tile < tiles.count; ++tile)
        for (long k = 0; k < depth; k += LANES)
            turn(weight + tile * tiles.used * depth + k, depth, tiles.width(tile),
                 std::min(depth - k, long(LANES)), packed.get() + tile * size + k * tiles.row,
                 tiles.row);
    const auto add = adder<In>(tiles.vectors);
    _Pragma("omp parallel") {
        Events<In> events(x, PIXELS);
        Corner corners[PIXELS];
        std::vector<word> bits(PIXELS * words);
        _Pragma("omp for schedule(dynamic)") for (long start = 0; start < pixels;
                                                  start += PIXELS) {
            const int rows = std::min(long(PIXELS), pixels - start);
            Corner corner = patches.corner(start);
            for (int r = 0; r < rows; ++r, patches.move_on(corner)) {
                corners[r] = corner;
                patches.cut(corners[r], bits.data() + r * words);
            }
            for (long t = 0; t < words; t += WORDS) {
                events.clear();
                for (int r = 0; r < rows; ++r)
                    for (long i = t; i < std::min(t + WORDS, words); ++i)
                        events.add(r, 64 * (i - t), bits[r * words + i],
                                   patches.start(corners[r]), patches.place.data() + 64 * i);
                for (long tile = 0; tile < tiles.count; ++tile)
                    add(rows, events, packed.get() + tile * size + 64 * t * tiles.row,
                        y + start * tiles.channels + tile * tiles.used, tiles.channels,
                        tiles.width(tile), t == 0);
            }
        }
    }
}

// The gradient of the weight, [out channels, depth]. Each of `parts` of the pixels has its own sum;
// how many there are depends on shapes alone. `threads` share these, and the words.
template <class In>
static void weight_gradient(const Patches& patches, const In* x, const real* grad, real* out,
                            long threads) {
    const long depth = patches.depth, pixels = patches.pixels(), words = patches.words;
    const Tiles tiles{patches.shape.out_channels};
    const long size = depth * tiles.channels, most = 64 * WORDS;
    const long parts = std::max(1L, std::min({16L, (1L << 22) / size, pixels / (4 * most)}));
    const long groups = std::min((2 * threads + parts - 1) / parts, words);
    Memory partial(parts * size);
    const auto add = adder<In>(tiles.vectors);
    _Pragma("omp parallel for schedule(dynamic)") for (long task = 0; task < parts * groups;
                                                       ++task) {
        const long part = task / groups, group = task % groups;
        const long begin = part * pixels / parts, end = (part + 1) * pixels / parts;
        Memory packed(tiles.count * most * tiles.row);
        Events<In> events(x, 64);
        std::vector<word> bits(most * words);
        long places[most];
        word square[64];
        for (long start = begin; start < end; start += most) {
            const int rows = std::min(most, end - start);
            for (int r = 0; r < rows; ++r) {
                const Corner corner = patches.corner(start + r);
                places[r] = patches.start(corner);
                patches.cut(corner, bits.data() + r * words);
                for (long c = 0; c < tiles.count; ++c)
                    memcpy(packed.get() + (c * most + r) * tiles.row,
                           grad + (start + r) * tiles.channels + c * tiles.used,
                           tiles.width(c) * sizeof(real));
            }
            for (long t = group * words / groups; t < (group + 1) * words / groups; ++t) {
                events.clear();
                for (int i = 0; i < rows; i += 64) {
                    for (int r = 0; r < 64; ++r)
                        square[r] = i + r < rows ? bits[(i + r) * words + t] : 0;
                    transpose(square);
                    for (int k = 0; k < 64; ++k)
                        events.add(k, i, square[k], patches.place[64 * t + k], places + i);
                }
                for (long c = 0; c < tiles.count; ++c)
                    add(std::min(64L, depth - 64 * t), events, packed.get() + c * most * tiles.row,
                        partial.get() + part * size + 64 * t * tiles.channels + c * tiles.used,
                        tiles.channels, tiles.width(c), start == begin);
            }
        }
    }
    _Pragma("omp parallel for") for (long c = 0; c < tiles.channels; c += 16)
        for (long some = 0; some < depth; some += 64)
            for (long j = c; j < std::min(c + 16, tiles.channels); ++j)
                for (long k = some; k < std::min(some + 64, depth); ++k) {
                    real sum = 0;
                    for (long part = 0; part < parts; ++part)
                        sum += partial.get()[part * size + k * tiles.channels + j];
                    out[j * depth + k] = sum;
                }
}

extern "C" {
long find(long rows, long size, const void* x, bool bytes, word* bits) {
    return bytes ? find(rows, size, (const byte*)x, bits) : find(rows, size, (const real*)x, bits);
}

// x: the inputs' values, bytes or reals; null where all are 0 or 1.
void convolve(const Shape* shape, const word* bits, const void* x, bool bytes, const real* weight,
              real* y) {
    const Patches patches(*shape, bits);
    if (!x) return convolve<void>(patches, x, weight, y);
    bytes ? convolve(patches, (const byte*)x, weight, y)
          : convolve(patches, (const real*)x, weight, y);
}

void weight_gradient(const Shape* shape, const word* bits, const void* x, bool bytes,
                     const real* grad, real* out, long threads) {
    const Patches patches(*shape, bits);
    if (!x) return weight_gradient<void>(patches, x, grad, out, threads);
    bytes ? weight_gradient(patches, (const byte*)x, grad, out, threads)
          : weight_gradient(patches, (const real*)x, grad, out, threads);
}
}
