"""The library of low_products.py in C++: products of bfloat16 by oneDNN's kernels, block by block."""

# A block of the right factor has 512 KiB, which a core's cache holds; what is summed has a MiB, however long the batch.
SOURCE = """#include <torch/csrc/inductor/cpp_prefix.h>
#include <array>
#include <atomic>
#include <exception>
#include <memory>
#include <omp.h>
using Low = at::BFloat16;
static void (*low_gemm)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const Low*, const Low*, float*,
                        bool);
static void (*low_gemm_ends)(bool);
static const void* (*torch_settings)();
static bool (*onednn_is_on)(const void*);
static constexpr int64_t ROWS = 1024, COLUMNS = 256, SUMMANDS = 1024;  // of a block
static constexpr int64_t TILE = 32;      // rows that a thread takes at a time
static constexpr int64_t ALONE = 1 << 22;  // multiplications, which two threads do not do faster

static int64_t ceil_of(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

static __m512i numbers(const Low* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// The right factor from row 2 begin to 2 end, its rows by pairs: a pair of entries is one number.
static void pair_rows(const Low* right, int64_t lead, bool by_columns, int64_t rows, int64_t columns, uint32_t* pairs,
                      int64_t width, int64_t begin, int64_t end) {
    const int64_t whole = std::min(end, rows / 2);
    if (by_columns && lead % 2 == 0) {  // pairs lie there already, column by column
        if (whole > begin)
            at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(right + 2 * begin), lead / 2,
                                          reinterpret_cast<float*>(pairs + begin * width), width, columns,
                                          whole - begin);
        begin = std::max(begin, whole);
    }
    const int64_t row = by_columns ? 1 : lead, column = by_columns ? lead : 1;
    for (int64_t k = begin; k < end; ++k) {
        const Low* const first = right + 2 * k * row;
        const Low* const second = first + row;
        uint32_t* const to = pairs + k * width;
        int64_t j = 0;
        for (; column == 1 && k < whole && j + 16 <= columns; j += 16)
            _mm512_storeu_si512(to + j, _mm512_or_si512(numbers(first + j),
                                                        _mm512_slli_epi32(numbers(second + j), 16)));
        for (; j < columns && 2 * k < rows; ++j)
            to[j] = first[j * column].x | (k < whole ? uint32_t(second[j * column].x) << 16 : 0);
        for (; j < columns; ++j) to[j] = 0;
    }
}

// Rows of the left factor, with zeros behind them: it is stored by columns, or has an odd number of them, of which a
// kernel reads pairs.
static void copy_rows(const Low* left, int64_t lead, bool by_columns, int64_t rows, int64_t columns, int64_t even,
                      Low* to, int64_t width) {
    for (int64_t i = 0; i < rows; i += 32) {
        const int64_t few = std::min<int64_t>(32, rows - i);
        for (int64_t k = 0; by_columns && k < columns; k += 32)
            at::vec::transpose_mxn<Low>(left + k * lead + i, lead, to + i * width + k, width,
                                        std::min<int64_t>(32, columns - k), few);
        for (int64_t row = i; row < i + few; ++row) {
            if (!by_columns) std::copy_n(left + row * lead, columns, to + row * width);
            std::fill(to + row * width + columns, to + row * width + even, Low(0.f));
        }
    }
}

// Rows of a result: sums, and what is added, rounded once.
static void round_rows(const float* sums, int64_t width, const Low* added, int64_t added_row, int64_t added_column,
                       Low* out, int64_t lead, int64_t rows, int64_t columns) {
    using Lows = at::vec::Vectorized<Low>;
    using Floats = at::vec::VectorizedN<float, 2>;
    constexpr int64_t SIZE = Lows::size();
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; j += SIZE) {
            const int64_t count = std::min(SIZE, columns - j);
            const float* const from = sums + i * width + j;  // as wide as vectors are
            __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + SIZE / 2);
            if (added) {
                const Low* terms = added + i * added_row + j * added_column;
                Low copied[SIZE];
                if (added_column != 1 || count < SIZE) {
                    for (int64_t n = 0; n < count; ++n) copied[n] = terms[n * added_column];
                    terms = copied;
                }
                low += _mm512_castsi512_ps(_mm512_slli_epi32(numbers(terms), 16));
                high += _mm512_castsi512_ps(_mm512_slli_epi32(numbers(terms + SIZE / 2), 16));
            }
            const auto rounded = to_bfloat16(Floats(at::vec::Vectorized<float>(low), at::vec::Vectorized<float>(high)));
            if (count == SIZE) _mm512_storeu_si512(out + i * lead + j, __m512i(rounded));
            else rounded.store(out + i * lead + j, count);
        }
    }
}

// The product without oneDNN, as torch has it: of float32 sums.
static void written_out(bool left_by_columns, bool right_by_columns, int64_t rows, int64_t columns, int64_t inner,
                        const Low* left, int64_t left_lead, const Low* right, int64_t right_lead, Low* out,
                        int64_t out_lead, const Low* added, int64_t added_row, int64_t added_column) {
    const int64_t row = right_by_columns ? 1 : right_lead, column = right_by_columns ? right_lead : 1;
    std::vector<float> sums(columns);
    for (int64_t i = 0; i < rows; ++i) {
        std::fill(sums.begin(), sums.end(), 0.f);
        for (int64_t k = 0; k < inner; ++k) {
            const float factor(left[left_by_columns ? k * left_lead + i : i * left_lead + k]);
            const Low* const from = right + k * row;
            if (column == 1) for (int64_t j = 0; j < columns; ++j) sums[j] += factor * float(from[j]);
            else for (int64_t j = 0; j < columns; ++j) sums[j] += factor * float(from[j * column]);
        }
        for (int64_t j = 0; j < columns; ++j)
            out[i * out_lead + j] = Low(added ? sums[j] + float(added[i * added_row + j * added_column]) : sums[j]);
    }
}

struct Room {  // of each thread that calls products: what blocks of these lie in
    std::vector<uint32_t> pairs;
    std::vector<Low> lefts;
    std::vector<float> sums;
    template <typename T> static T* of(std::vector<T>& memory, int64_t count) {
        constexpr size_t LINE = 64;  // of a cache: a row of a tile that lies across two takes twice as long
        const size_t needed = count + LINE / sizeof(T);
        if (memory.size() < needed) memory.resize(needed);
        return reinterpret_cast<T*>((reinterpret_cast<size_t>(memory.data()) + LINE - 1) / LINE * LINE);
    }
};

// Right factors by pairs of rows, of the loop that the calling thread runs: matrices that stay as they are in it.
struct Kept {
    struct Factor {
        std::array<int64_t, 5> place;  // its address, its sizes, how far apart rows are, or columns, and how both lie
        std::vector<uint32_t> memory;
    };
    bool keeps = false;
    std::vector<std::unique_ptr<Factor>> factors;
    static Kept& here() {
        static thread_local Kept kept;
        return kept;
    }
    Factor* of(const std::array<int64_t, 5>& place) const {
        for (const auto& factor : factors)
            if (factor->place == place) return factor.get();
        return nullptr;
    }
};

static void keep_factors(bool keeps) {
    Kept::here().factors.clear();
    Kept::here().keeps = keeps;
}

// out = left @ right + added, as product() has it. A sum is one of float32, of blocks in turn, and does not depend on
// the number of threads.
static void low_blocks(bool left_by_columns, bool right_by_columns, int64_t rows, int64_t columns, int64_t inner,
                       const Low* left, int64_t left_lead, const Low* right, int64_t right_lead, Low* out,
                       int64_t out_lead, const Low* added, int64_t added_row, int64_t added_column, bool stays) {
    static thread_local Room room;
    const int most = rows * columns * inner < ALONE ? 1 : omp_get_max_threads();
    // torch keeps a kernel for every number of summands. Behind a left factor by columns it is often that of a batch,
    // which may have any size: zeros fill it up.
    const bool copies = left_by_columns || inner % 2;
    const int64_t width = ceil_of(std::min(columns, COLUMNS), 32), depth = ceil_of(std::min(inner, SUMMANDS), 32);
    const int64_t left_width = depth + 32, panel = std::min(rows, ROWS);  // not a power of two: lines of a cache
    const int64_t block_size = width * depth / 2, across = (columns + COLUMNS - 1) / COLUMNS;
    const bool keeps = stays && Kept::here().keeps;
    const std::array<int64_t, 5> place{reinterpret_cast<int64_t>(right), inner, columns, right_lead,
                                       right_by_columns + 2 * left_by_columns};
    Kept::Factor* kept = keeps ? Kept::here().of(place) : nullptr;
    const bool is_laid_out = kept;
    if (keeps && !kept) {
        kept = Kept::here().factors.emplace_back(std::make_unique<Kept::Factor>()).get();
        kept->place = {};  // until it is laid out
    }
    const int64_t blocks = keeps ? across * ((inner + SUMMANDS - 1) / SUMMANDS) : 1;
    uint32_t* const memory = Room::of(keeps ? kept->memory : room.pairs, blocks * block_size);
    Low* const lefts = copies ? Room::of(room.lefts, panel * left_width) : nullptr;
    const bool once = inner <= SUMMANDS;  // then a tile's sums are read at once, and those of the next lie there
    float* const sums = Room::of(room.sums, (once ? most * TILE : panel) * width);
    std::exception_ptr failed;
    #pragma omp parallel num_threads(most)
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        for (int64_t i0 = 0; i0 < rows; i0 += ROWS)
        for (int64_t j0 = 0; j0 < columns; j0 += COLUMNS)
        for (int64_t k0 = 0; k0 < inner; k0 += SUMMANDS) {
            const int64_t m = std::min(ROWS, rows - i0), n = std::min(COLUMNS, columns - j0);
            const int64_t k = std::min(SUMMANDS, inner - k0), even = ceil_of(k, left_by_columns ? 32 : 2);
            const int64_t tile = std::min(TILE, ceil_of((m + threads - 1) / threads, 16));
            const int64_t share = ceil_of((even / 2 + threads - 1) / threads, 16);
            const Low* const block = left + (left_by_columns ? k0 * left_lead + i0 : i0 * left_lead + k0);
            uint32_t* const pairs = memory + (keeps ? k0 / SUMMANDS * across + j0 / COLUMNS : 0) * block_size;
            if (!is_laid_out && (!keeps || !i0)) {
                pair_rows(right + (right_by_columns ? j0 * right_lead + k0 : k0 * right_lead + j0), right_lead,
                          right_by_columns, k, n, pairs, width, std::min(thread * share, even / 2),
                          std::min((thread + 1) * share, even / 2));
                #pragma omp barrier
            }
            #pragma omp for schedule(static)
            for (int64_t i = 0; i < m; i += tile) {
                const int64_t few = std::min(tile, m - i);
                const Low* from = block + i * left_lead;
                float* const found = sums + (once ? thread * TILE : i) * width;
                if (copies) {
                    if (!j0 || inner > SUMMANDS)
                        copy_rows(block + i * (left_by_columns ? 1 : left_lead), left_lead, left_by_columns, few, k,
                                  even, lefts + i * left_width, left_width);
                    from = lefts + i * left_width;
                }
                try {
                    low_gemm(few, n, even, copies ? left_width : left_lead, width, width, k0 > 0, from,
                             reinterpret_cast<const Low*>(pairs), found, true);
                } catch (...) {
                    #pragma omp critical
                    failed = std::current_exception();
                }
                if (k0 + k == inner)
                    round_rows(found, width,
                               added ? added + (i0 + i) * added_row + j0 * added_column : nullptr, added_row,
                               added_column, out + (i0 + i) * out_lead + j0, out_lead, few, n);
            }
        }
        low_gemm_ends(true);
    }
    if (failed) std::rethrow_exception(failed);
    if (keeps) kept->place = place;  // it is whole
}

// Whether the kernels do what is expected of them, by products of small integers, which all sums have exactly: of one
// block, and of several, on all threads.
static void check_low_products() {
    for (const auto& [rows, columns, inner] : {std::array<int64_t, 3>{19, 35, 37}, {45, 290, 1090}}) {
        std::vector<Low> left(rows * inner), right(inner * columns), left_by_columns(left), right_by_columns(right);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = 0; k < inner; ++k)
                left[i * inner + k] = left_by_columns[k * rows + i] = Low(float((i * 3 + k * 7) % 5 - 2));
        for (int64_t k = 0; k < inner; ++k)
            for (int64_t j = 0; j < columns; ++j)
                right[k * columns + j] = right_by_columns[j * inner + k] = Low(float((k * 5 + j * 2) % 7 - 3));
        std::vector<Low> expected(rows * columns), found(rows * columns);
        written_out(false, false, rows, columns, inner, left.data(), inner, right.data(), columns, expected.data(),
                    columns, nullptr, 0, 0);
        for (const bool first : {false, true})
            for (const bool second : {false, true}) {
                low_blocks(first, second, rows, columns, inner, (first ? left_by_columns : left).data(),
                           first ? rows : inner, (second ? right_by_columns : right).data(), second ? inner : columns,
                           found.data(), columns, nullptr, 0, 0, false);
                for (size_t i = 0; i < found.size(); ++i)
                    if (found[i].x != expected[i].x) throw std::runtime_error("products of bfloat16 are wrong");
            }
    }
}

static std::atomic<bool> is_checked{false};

static void require_products() {
    if (is_checked) return;
    check_low_products();
    is_checked = true;
}

static void low_product_or_sums(bool left_by_columns, bool right_by_columns, int64_t rows, int64_t columns,
                                int64_t inner, const Low* left, int64_t left_lead, const Low* right,
                                int64_t right_lead, Low* out, int64_t out_lead, const Low* added, int64_t added_row,
                                int64_t added_column, bool stays) {
    if (inner && onednn_is_on(torch_settings())) {
        require_products();
        try {
            low_blocks(left_by_columns, right_by_columns, rows, columns, inner, left, left_lead, right, right_lead,
                       out, out_lead, added, added_row, added_column, stays);
            return;
        } catch (const std::exception&) {  // another thread has switched oneDNN off meanwhile
        }
    }
    written_out(left_by_columns, right_by_columns, rows, columns, inner, left, left_lead, right, right_lead, out,
                out_lead, added, added_row, added_column);
}

static const struct {
    decltype(&low_product_or_sums) product;
    decltype(&keep_factors) keep;
} low_kernels{low_product_or_sums, keep_factors};

static void connect_kernels(int64_t gemm, int64_t ends, int64_t settings, int64_t is_on, char* found) {
    low_gemm = reinterpret_cast<decltype(low_gemm)>(gemm);
    low_gemm_ends = reinterpret_cast<decltype(low_gemm_ends)>(ends);
    torch_settings = reinterpret_cast<decltype(torch_settings)>(settings);
    onednn_is_on = reinterpret_cast<decltype(onednn_is_on)>(is_on);
    is_checked = false;
    if (onednn_is_on(torch_settings())) require_products();
    *reinterpret_cast<int64_t*>(found) = reinterpret_cast<int64_t>(&low_kernels);
}
"""
