// Convolutions of spikes on a CPU: rows of the weight are added up, only where an input is not 0.
//
// Which inputs of a pixel are not 0 is found once, for all the outputs that see it: Events. Then
// `add_rows` keeps a tile of outputs in registers while it adds the rows of the weight that these
// name. The weight's gradient is the same sum with pixels and depth exchanged: bits, which the
// forward pass has saved, are transposed, and rows of the output's gradient are added up. Each
// output has its sum in one order, whatever the batch and the threads.
//
// Values that are not 1 count as they are, so that any input is right; a dense one takes longer.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
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
constexpr int MOST_VECTORS = 6;  // of a tile, in registers
constexpr int NEAR = 1 << 16;    // bytes of a tile at most, to stay in a near cache
constexpr int PIXELS = 256;      // about so many are summed before the next tile

struct Shape {
    long images, height, width, channels, out_height, out_width, out_channels;
    long kernel[2], stride[2], padding[2];

    // Of a row of outputs, those of all images counted: where its image begins, and the first row
    // there that it sees. Of a column of outputs: the first column that it sees.
    long image(long line) const { return line / out_height * height; }
    long top(long line) const { return line % out_height * stride[0] - padding[0]; }
    long left(long column) const { return column * stride[1] - padding[1]; }
};

// Bits -------------------------------------------------------------------------------------------

// Of 64 inputs: bits of those that are not 0, and of those that are 1.
struct Found {
    word some, ones;
};

template <class In>
static Found look(const In* x) {
    unsigned some[2] = {0, 0}, ones[2] = {0, 0};
    for (int half = 0; half < 2; ++half, x += 32) {  // in loops that a compiler turns into vectors
        for (int k = 0; k < 32; ++k) some[half] |= x[k] != 0 ? 1u << k : 0;
        for (int k = 0; k < 32; ++k) ones[half] |= x[k] == 1 ? 1u << k : 0;
    }
    return {some[0] | word(some[1]) << 32, ones[0] | word(ones[1]) << 32};
}

// The same of `size` inputs, of which the first 64 count.
template <class In>
static Found look(const In* x, long size) {
    if (size >= 64) return look(x);
    In rest[64] = {};
    memcpy(rest, x, size * sizeof(In));
    return look(rest);
}

// Writes the bits of a row of numbers. Returns how many are not 0, and how many are 1.
template <class In>
static std::pair<long, long> find_row(const In* x, long size, word* bits) {
    long count = 0, ones = 0;
    for (long i = 0; i < size; i += 64) {
        const Found found = look(x + i, size - i);
        bits[i / 64] = found.some;
        count += __builtin_popcountll(found.some);
        ones += __builtin_popcountll(found.ones);
    }
    return {count, ones};
}

// The bits of all rows, each of which begins a word. Returns how many are not 0, or minus that
// where one of them is not 1.
template <class In>
static long find(long rows, long size, const In* x, word* bits) {
    long count = 0, ones = 0;
    _Pragma("omp parallel for reduction(+ : count, ones)") for (long r = 0; r < rows; ++r) {
        const auto [some, one] = find_row(x + r * size, size, bits + r * ((size + 63) / 64));
        count += some;
        ones += one;
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

// The bits of a row, which has `size`, from `begin` on, at most 64; 0 where it has none.
static word cut(const word* row, long size, long begin, long count) {
    const long first = std::max(begin, 0L), end = std::min(begin + count, size), shift = first % 64;
    if (first >= end) return 0;
    word some = row[first / 64] >> shift;
    if (shift + end - first > 64) some |= row[first / 64 + 1] << (64 - shift);
    if (end - first < 64) some &= (word(1) << (end - first)) - 1;
    return some << (first - begin);
}

// Sums -------------------------------------------------------------------------------------------

static const struct Places {  // of the bits of each byte
    word of[256];
    Places() : of() {
        for (int bits = 0; bits < 256; ++bits)
            for (int bit = 0, n = 0; bit < 8; ++bit)
                if (bits >> bit & 1) of[bits] |= word(bit) << 8 * n++;
    }
} places;

// Writes `first` plus the places of the bits, and up to 8 bytes of no meaning behind; returns how
// many there are. No branch depends on the bits: it would be guessed wrong as often as not.
static int write_places(word bits, int first, byte* out) {
    const byte* start = out;
    for (int k = 0; k < 64; k += 8, bits >>= 8) {
        const word found = places.of[bits & 255] + word(first + k) * 0x0101010101010101;
        memcpy(out, &found, sizeof found);
        out += __builtin_popcount(bits & 255);
    }
    return out - start;
}

// Which rows of a tile are added up, a list a slot, and with what values, where not all are 1.
struct Events {
    std::vector<int> start;  // of each slot's list; the last is the end
    std::vector<char> ones;  // whether all values of a slot are 1
    std::unique_ptr<byte[]> row;
    std::unique_ptr<real[]> value;
    long room = 0;

    void clear(long most) {  // events
        start.assign(1, 0);
        ones.clear();
        if (most <= room) return;
        row.reset(new byte[most + 8]);
        value.reset(new real[most]);
        room = most;
    }
    void open_slot() {
        start.push_back(start.back());
        ones.push_back(true);
    }
    // Appends the bits of a word, from row `first` of the tile on. value_of(bit) is asked unless it
    // is known that all are 1.
    template <class Value>
    void add(int first, word bits, bool all_ones, const Value& value_of) {
        const int from = *(start.end() - 2), begin = start.back();
        const int end = start.back() += write_places(bits, first, row.get() + begin);
        if (all_ones && ones.back()) return;
        if (ones.back()) std::fill(value.get() + from, value.get() + begin, 1);
        ones.back() = false;
        for (int n = begin; n < end; ++n) value[n] = value_of(row[n] - first);
    }
};

// Adds to each of `rows` outputs the rows of `tile` that its slots' events name: of `taps` slots,
// each for `size` numbers of the tile; one below 0 has no events. The next output's are `every`
// slots on. A row of the tile has V vectors, one of outputs `width` numbers.
template <int V>
static void add_rows(int rows, const Events& events, const int* slots, int every, int taps,
                     const real* tile, long size, real* out, long stride, int width, bool first) {
    const bool whole = width == V * LANES;
    for (int r = 0; r < rows; ++r, out += stride, slots += every) {
        vec sum[V], narrow[V];
        if (!whole && !first) memcpy(narrow, out, width * sizeof(real));
        UNROLL for (int j = 0; j < V; ++j) {
            sum[j] = first ? vec{} : narrow[j];
            if (whole && !first) memcpy(sum + j, out + j * LANES, sizeof(vec));
        }
        for (int tap = 0; tap < taps; ++tap) {
            const int slot = slots[tap];
            if (slot < 0) continue;
            const vec* start = (const vec*)(tile + tap * size);
            const int begin = events.start[slot], end = events.start[slot + 1];
            if (events.ones[slot])
                for (int i = begin; i < end; ++i) {
                    const vec* from = start + events.row[i] * V;
                    UNROLL for (int j = 0; j < V; ++j) sum[j] += from[j];
                }
            else
                for (int i = begin; i < end; ++i) {
                    const vec* from = start + events.row[i] * V;
                    UNROLL for (int j = 0; j < V; ++j) sum[j] += events.value[i] * from[j];
                }
        }
        UNROLL for (int j = 0; j < V; ++j) {
            narrow[j] = sum[j];
            if (whole) memcpy(out + j * LANES, sum + j, sizeof(vec));
        }
        if (!whole) memcpy(out, narrow, width * sizeof(real));
    }
}

static auto adder(int vectors) {
    return vectors == 1 ? add_rows<1> : vectors == 2 ? add_rows<2> : vectors == 3 ? add_rows<3>
         : vectors == 4 ? add_rows<4> : add_rows<6>;
}

struct Tiles {  // of `channels` outputs, all but the last of the same width
    const long channels, all = (channels + LANES - 1) / LANES;
    const long count = (all + MOST_VECTORS - 1) / MOST_VECTORS;
    const long used = (all + count - 1) / count * LANES;  // numbers of a tile
    const int vectors = used < 4 * LANES ? used / LANES : (used / LANES + 1) / 2 * 2;
    const long row = vectors * LANES;  // numbers in memory
    // Words whose bits a tile has rows for; the rows' numbers are bytes.
    const long words = std::clamp<long>(NEAR / (64 * vectors * sizeof(vec)), 1, 4);
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

// Where events are found: once in each input pixel, which several outputs see, or for each output,
// in all that it sees, where these are few. A kernel has pieces, which are inputs side by side: a
// pixel's, or those of a row of the kernel.
struct Sites {
    const Shape& shape;
    const bool small, direct, shared;
    const long pieces, piece, of_piece;  // of a kernel; inputs and words of each
    const long taps, words;              // sites that an output sees, and the words of one
    const long of_group, groups;         // words of a site that share a slot

    Sites(const Shape& s, long of_group)
        : shape(s), small(s.channels < 32),
          direct(s.kernel[0] * s.kernel[1] == 1 && !s.padding[0] && !s.padding[1]),
          shared(!small && !direct), pieces(s.kernel[0] * (small ? 1 : s.kernel[1])),
          piece(s.channels * (small ? s.kernel[1] : 1)), of_piece((piece + 63) / 64),
          taps(shared ? pieces : 1), words(of_piece * pieces / taps), of_group(of_group),
          groups((words + of_group - 1) / of_group) {}

    // The events of a pixel.
    template <class In>
    void add(Events& events, const In* x) const {
        for (long i = 0; i < words; ++i) {
            const In* from = x + 64 * i;
            const Found found = look(from, piece - 64 * i);
            if (i % of_group == 0) events.open_slot();
            events.add(64 * (i % of_group), found.some, found.some == found.ones,
                       [from](int bit) { return from[bit]; });
        }
    }

    // Fills `events` and, for each output and group, the slots of its taps: of rows of outputs,
    // those of all images counted.
    template <class In>
    void find(const In* x, long begin, long end, Events& events, int* slots,
              std::vector<word>& bits) const {
        const long size = shape.width * shape.channels, of_row = (size + 63) / 64;
        const auto inside = [&](long row) { return std::clamp(row, 0L, shape.height); };
        const long from = shape.image(begin) + inside(shape.top(begin));
        const long until = shape.image(end - 1) + inside(shape.top(end - 1) + shape.kernel[0]);
        const long sites = shared ? (until - from) * shape.width : (end - begin) * shape.out_width;
        bool ones = true;
        events.clear(sites * words * 64);
        if (shared) {
            for (long i = 0; i < sites; ++i) add(events, x + from * size + i * piece);
        } else if (!direct) {
            bits.resize((until - from) * of_row);
            for (long row = from; row < until; ++row) {
                word* const place = &bits[(row - from) * of_row];
                const auto [some, one] = find_row(x + row * size, size, place);
                ones &= some == one;
            }
        }
        for (long line = begin; line < end; ++line)
            for (long column = 0; column < shape.out_width; ++column, slots += taps * groups) {
                const long h = shape.top(line), w = shape.left(column), row = shape.image(line) + h;
                if (direct) add(events, x + row * size + w * piece);
                for (long i = 0; small && !direct && i < words; ++i) {
                    const long y = i / of_piece, k = w * shape.channels + i % of_piece * 64;
                    const long count = std::min(64L, piece - i % of_piece * 64);
                    const In* place = x + (row + y) * size + k;
                    if (i % of_group == 0) events.open_slot();
                    if (h + y >= 0 && h + y < shape.height)
                        events.add(64 * (i % of_group),
                                   cut(&bits[(row + y - from) * of_row], size, k, count), ones,
                                   [place](int bit) { return place[bit]; });
                }
                if (!shared) std::iota(slots, slots + groups, events.ones.size() - groups);
                for (long y = 0, tap = 0; shared && y < shape.kernel[0]; ++y)
                    for (long z = w; z < w + shape.kernel[1]; ++z, ++tap) {
                        const bool seen = h + y >= 0 && h + y < shape.height && z >= 0 &&
                                          z < shape.width;
                        const long slot = ((row + y - from) * shape.width + z) * groups;
                        for (long g = 0; g < groups; ++g)
                            slots[g * taps + tap] = seen ? slot + g : -1;
                    }
            }
    }
};

template <class In>
static void convolve(const Shape& shape, const In* x, const real* weight, real* y, long threads) {
    const Tiles tiles{shape.out_channels};
    const Sites sites(shape, tiles.words);
    const long taps = sites.taps, groups = sites.groups, width = shape.out_width;
    const long of_piece = sites.of_piece * 64 * tiles.row, size = sites.pieces * of_piece;
    const long of_tap = sites.words * 64 * tiles.row, of_group = tiles.words * 64 * tiles.row;
    const long depth = sites.pieces * sites.piece;
    Memory packed(tiles.count * size);
    _Pragma("omp parallel for collapse(3)") for (long tile = 0; tile < tiles.count; ++tile)
        for (long n = 0; n < sites.pieces; ++n)
            for (long k = 0; k < sites.piece; k += LANES)
                turn(weight + tile * tiles.used * depth + n * sites.piece + k, depth,
                     tiles.width(tile), std::min(sites.piece - k, long(LANES)),
                     packed.get() + tile * size + n * of_piece + k * tiles.row, tiles.row);
    const auto add = adder(tiles.vectors);
    const long lines = shape.images * shape.out_height;
    // Rows of outputs at a time, so that all threads get as many.
    const long turns = (lines * width + threads * PIXELS - 1) / (threads * PIXELS);
    const long some = (lines + turns * threads - 1) / (turns * threads);
    const long together = std::clamp(tiles.words / sites.words, 1L, taps);  // taps of a tile
    _Pragma("omp parallel") {
        Events events;
        std::vector<int> slots(some * width * taps * groups);
        std::vector<word> bits;
        _Pragma("omp for schedule(dynamic)") for (long line = 0; line < lines; line += some) {
            const long end = std::min(line + some, lines);
            sites.find(x, line, end, events, slots.data(), bits);
            for (long tile = 0; tile < tiles.count; ++tile)
                for (long tap = 0; tap < taps; tap += together)
                    for (long g = 0; g < groups; ++g)
                        add((end - line) * width, events, slots.data() + g * taps + tap,
                            groups * taps, std::min(together, taps - tap),
                            packed.get() + tile * size + tap * of_tap + g * of_group, of_tap,
                            y + line * width * tiles.channels + tile * tiles.used, tiles.channels,
                            tiles.width(tile), tap + g == 0);
        }
    }
}

// The gradient of the weight, [out channels, depth]. Each of `parts` of the pixels has its own sum;
// how many there are depends on shapes alone. `threads` share these, and the words of a patch: of
// the `run` inputs that a row of the kernel sees, for each row.
template <class In>
static void weight_gradient(const Shape& shape, const word* bits, const In* x, const real* grad,
                            real* out, long threads) {
    const Tiles tiles{shape.out_channels};
    const long most = 64 * tiles.words;  // pixels at a time
    const long run = shape.kernel[1] * shape.channels, of_run = (run + 63) / 64;
    const long of_row = shape.width * shape.channels, words = shape.kernel[0] * of_run;
    const long depth = shape.kernel[0] * run;
    const long pixels = shape.images * shape.out_height * shape.out_width;
    const long size = depth * tiles.channels;
    const long parts = std::max(1L, std::min({16L, (1L << 22) / size, pixels / (4 * most)}));
    const long groups = std::min((2 * threads + parts - 1) / parts, words);
    Memory partial(parts * tiles.count * words * 64 * tiles.row);
    const auto sums = [&](long part, long tile, long word) {
        return partial.get() + ((part * tiles.count + tile) * words + word) * 64 * tiles.row;
    };
    const auto add = adder(tiles.vectors);
    _Pragma("omp parallel for schedule(dynamic)") for (long task = 0; task < parts * groups;
                                                       ++task) {
        const long part = task / groups, group = task % groups;
        const long begin = part * pixels / parts, end = (part + 1) * pixels / parts;
        Memory packed(tiles.count * most * tiles.row);
        Events events;
        std::vector<long> image(most), top(most), place(most);
        std::vector<word> square(most);
        int slots[64];
        std::iota(slots, slots + 64, 0);
        for (long start = begin; start < end; start += most) {
            const int rows = std::min(most, end - start);
            for (int r = 0; r < rows; ++r) {
                const long line = (start + r) / shape.out_width;
                image[r] = shape.image(line), top[r] = shape.top(line);
                for (long c = 0; c < tiles.count; ++c)
                    memcpy(packed.get() + (c * most + r) * tiles.row,
                           grad + (start + r) * tiles.channels + c * tiles.used,
                           tiles.width(c) * sizeof(real));
            }
            for (long t = group * words / groups; t < (group + 1) * words / groups; ++t) {
                const long k = t % of_run * 64, count = std::min(64L, run - k);
                for (int r = 0; r < most; ++r) {
                    square[r] = 0;
                    if (r >= rows) continue;
                    const long left = shape.left((start + r) % shape.out_width);
                    const long from = left * shape.channels + k, h = top[r] + t / of_run;
                    place[r] = (image[r] + h) * of_row + from;
                    if (h >= 0 && h < shape.height)
                        square[r] = cut(bits + (image[r] + h) * ((of_row + 63) / 64), of_row, from,
                                        count);
                }
                for (int i = 0; i < most; i += 64) transpose(square.data() + i);
                events.clear(64 * most);
                for (int j = 0; j < count; ++j) {
                    events.open_slot();
                    for (int i = 0; i < rows; i += 64)
                        events.add(i, square[i + j], !x,
                                   [&](int pixel) { return x[place[i + pixel] + j]; });
                }
                for (long c = 0; c < tiles.count; ++c)
                    add(count, events, slots, 1, 1, packed.get() + c * most * tiles.row, 0,
                        sums(part, c, t), tiles.row, tiles.row, start == begin);
            }
        }
    }
    _Pragma("omp parallel for collapse(2)") for (long c = 0; c < tiles.count; ++c)
        for (long t = 0; t < words; ++t)
            for (long j = 0; j < tiles.width(c); ++j)
                for (long k = 0; k < std::min(64L, run - t % of_run * 64); ++k) {
                    const long place = t / of_run * run + t % of_run * 64 + k;
                    real sum = 0;
                    for (long part = 0; part < parts; ++part)
                        sum += sums(part, c, t)[k * tiles.row + j];
                    out[(c * tiles.used + j) * depth + place] = sum;
                }
}

// Products ---------------------------------------------------------------------------------------

struct Matrices {  // of three batch dimensions: sizes and, of a, b and out, distances in memory
    long batch[3], rows, depth, columns;
    struct Steps {
        long batch[3], row, column;
    } a, b, out;
};

extern "C" {
// out = a @ b, where only those numbers of a cost time that are not 0. Of a the columns, or the
// rows, are dense in memory, of b and out the rows.
void multiply(const Matrices& m, const real* a, const real* b, real* out) {
    const bool by_rows = m.a.column == 1;
    const long lines = by_rows ? m.rows : m.depth, size = by_rows ? m.depth : m.rows;
    _Pragma("omp parallel for collapse(3)") for (long i = 0; i < m.batch[0]; ++i)
        for (long j = 0; j < m.batch[1]; ++j)
            for (long k = 0; k < m.batch[2]; ++k) {
                const auto start = [&](const Matrices::Steps& steps) {
                    return i * steps.batch[0] + j * steps.batch[1] + k * steps.batch[2];
                };
                const real *from = a + start(m.a), *factor = b + start(m.b);
                real* to = out + start(m.out);
                for (long row = 0; row < m.rows; ++row)
                    std::fill_n(to + row * m.out.row, m.columns, 0);
                for (long line = 0; line < lines; ++line) {
                    const real* values = from + line * (by_rows ? m.a.row : m.a.column);
                    for (long first = 0; first < size; first += 64)
                        for (word some = look(values + first, size - first).some; some;
                             some &= some - 1) {
                            const long n = first + __builtin_ctzll(some);
                            const real value = values[n];
                            const real* add = factor + (by_rows ? n : line) * m.b.row;
                            real* sum = to + (by_rows ? line : n) * m.out.row;
                            for (long c = 0; c < m.columns; ++c) sum[c] += value * add[c];
                        }
                }
            }
}

long find(long rows, long size, const void* x, bool bytes, word* bits) {
    return bytes ? find(rows, size, (const byte*)x, bits) : find(rows, size, (const real*)x, bits);
}

void convolve(const Shape& shape, const void* x, bool bytes, const real* weight, real* y,
              long threads) {
    bytes ? convolve(shape, (const byte*)x, weight, y, threads)
          : convolve(shape, (const real*)x, weight, y, threads);
}

// One byte for each bit that `find` has written.
void unpack(long rows, long size, const word* bits, byte* x) {
    const long words = (size + 63) / 64;
    _Pragma("omp parallel for") for (long r = 0; r < rows; ++r)
        for (long i = 0; i < size; ++i) x[r * size + i] = bits[r * words + i / 64] >> i % 64 & 1;
}

// x: the inputs' values, bytes or reals; null where all are 0 or 1.
void weight_gradient(const Shape& shape, const word* bits, const void* x, bool bytes,
                     const real* grad, real* out, long threads) {
    bytes ? weight_gradient(shape, bits, (const byte*)x, grad, out, threads)
          : weight_gradient(shape, bits, (const real*)x, grad, out, threads);
}
}
