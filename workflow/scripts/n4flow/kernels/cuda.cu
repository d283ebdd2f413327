// The passes over the voxels for NVIDIA GPUs from compute capability 7.5 on; cuda.py launches them.
//
// Voxels lie in rows along the longest axis (k), as in compiled.py: of each row (i, j) of the grid
// the piece from its first voxel in the mask to its last, one behind the other, in float32, with NaN
// outside the mask. `row_base` is such that voxel (i, j, k) is values[row_base[row] + k].
//
// No sum has an order that chance decides: histograms are whole numbers; other sums are added by
// single threads in the order of the voxels, and beyond them in trees of a fixed shape. So results
// are the same bits in every run. `done` ends a stage on the device: once it is set, every pass
// returns at once. All shared memory is dynamic, and of a grid and of a block only x is used.
//
// Compile with the constants defined that cuda.py names: it has them from where the host's code has them.

extern __shared__ __align__(16) unsigned char dynamic_shared[];

typedef long long int64;
typedef unsigned long long count64;

// Shares of a voxel between two bins are counted in units of 1 / SHARE_UNIT. A block's share of
// voxels times the unit stays below 2^32.
#define SHARE_UNIT 65536u

// Voxels that a thread asks for before it needs the first.
#define AT_ONCE 4

#define WARP 32
#define ALL_LANES 0xffffffffu

static_assert(THREADS % WARP == 0, "blocks are made of whole warps");
static_assert(HISTOGRAM_VOXELS % 4 == 0, "voxels are read in fours");
static_assert(HISTOGRAM_VOXELS < 65536, "a block's histogram would overflow");

__device__ bool is_nan(float value) { return value != value; }

__device__ double warp_sum(double value)
{
    for (int apart = WARP / 2; apart > 0; apart /= 2)
        value += __shfl_down_sync(ALL_LANES, value, apart);
    return value; // in the first lane
}

__device__ double larger(double a, double b) { return fmax(a, b); }
__device__ double plus(double a, double b) { return a + b; }

// Join a number of each thread of a block, in a fixed order: in all threads. `of_warp` is shared memory for a number a
// warp, which nobody else may use before all have come out of here.
template <double (*JOIN)(double, double)> __device__ double block_joined(double value, double* of_warp)
{
    for (int apart = WARP / 2; apart > 0; apart /= 2)
        value = JOIN(value, __shfl_down_sync(ALL_LANES, value, apart));
    __syncthreads(); // all have read what was there before
    if (threadIdx.x % WARP == 0)
        of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    value = of_warp[0];
    for (int warp = 1; warp < THREADS / WARP; ++warp)
        value = JOIN(value, of_warp[warp]);
    return value;
}

// What `subtract` finds: of a voxel, a thread, a block, and in the end of all.
struct Found {
    float low, high;
    double total, squares;
};

__device__ Found joined(Found a, Found b)
{
    a.low = fminf(a.low, b.low);
    a.high = fmaxf(a.high, b.high);
    a.total += b.total;
    a.squares += b.squares;
    return a;
}

// Join what all threads of a block found: in the first thread. Takes a Found of shared memory a warp.
__device__ Found block_found(Found mine)
{
    Found* of_warp = reinterpret_cast<Found*>(dynamic_shared);
    for (int apart = WARP / 2; apart > 0; apart /= 2) {
        Found other;
        other.low = __shfl_down_sync(ALL_LANES, mine.low, apart);
        other.high = __shfl_down_sync(ALL_LANES, mine.high, apart);
        other.total = __shfl_down_sync(ALL_LANES, mine.total, apart);
        other.squares = __shfl_down_sync(ALL_LANES, mine.squares, apart);
        mine = joined(mine, other);
    }
    if (threadIdx.x % WARP == 0)
        of_warp[threadIdx.x / WARP] = mine;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < THREADS / WARP; ++warp)
            mine = joined(mine, of_warp[warp]);
    return mine;
}

// ---------------------------------------------------------------------------- histogram

__device__ void bin_of(float value, float low, float scale, int bins, int* bin, float* fraction)
{
    const float position = fminf(fmaxf((value - low) * scale, 0.0f), (float)(bins - 1));
    *bin = min((int)position, bins - 2);
    *fraction = position - (float)*bin;
}

// Histogram of all values into `counts`, in units of 1 / SHARE_UNIT. A block first counts its own
// voxels in shared memory, in `copies` histograms side by side, so that equal neighbours do not
// wait for each other; without any copies (too many bins) it counts in global memory.
extern "C" __global__ void histogram(const int* __restrict__ done, const float* __restrict__ range,
                                     const float* __restrict__ values, int64 voxels, int bins, int copies,
                                     count64* counts)
{
    if (*done)
        return;
    unsigned int* parts = reinterpret_cast<unsigned int*>(dynamic_shared);
    for (int n = threadIdx.x; n < bins * copies; n += THREADS)
        parts[n] = 0;
    __syncthreads();
    const float low = range[0], scale = range[2];
    const int64 begin = (int64)blockIdx.x * HISTOGRAM_VOXELS;
    const int64 end = begin + HISTOGRAM_VOXELS < voxels ? begin + HISTOGRAM_VOXELS : voxels;
    const int copy = copies ? threadIdx.x % copies : 0;
    for (int64 n = begin + 4 * threadIdx.x; n < end; n += 4 * THREADS) { // rows are multiples of 4
        const float4 four = *reinterpret_cast<const float4*>(values + n);
        const float each[4] = {four.x, four.y, four.z, four.w};
        for (int m = 0; m < 4; ++m) {
            if (is_nan(each[m]))
                continue;
            int bin;
            float fraction;
            bin_of(each[m], low, scale, bins, &bin, &fraction);
            const unsigned int share = (unsigned int)(fraction * (float)SHARE_UNIT + 0.5f);
            if (copies) {
                atomicAdd(parts + bin * copies + copy, SHARE_UNIT - share);
                atomicAdd(parts + (bin + 1) * copies + copy, share);
            } else {
                atomicAdd(counts + bin, (count64)(SHARE_UNIT - share));
                atomicAdd(counts + bin + 1, (count64)share);
            }
        }
    }
    __syncthreads();
    if (copies)
        for (int bin = threadIdx.x; bin < bins; bin += THREADS) {
            count64 sum = 0;
            for (int n = 0; n < copies; ++n)
                sum += parts[bin * copies + n];
            if (sum)
                atomicAdd(counts + bin, sum);
        }
}

// ---------------------------------------------------------------------------- sharpening

__device__ double2 product(double2 a, double2 b)
{
    return make_double2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}

// Fourier transform in place by one block. The result is in bit-reversed order, which does not
// matter: what is multiplied with it is in the same order, and `transform_back` begins with it.
__device__ void transform(double2* z, const double2* __restrict__ roots, int size)
{
    for (int half = size / 2, step = 1; half > 0; half /= 2, step *= 2) {
        __syncthreads();
        for (int n = threadIdx.x; n < size / 2; n += THREADS) {
            const int k = n & (half - 1), at = 2 * n - k;
            const double2 a = z[at], b = z[at + half];
            z[at] = make_double2(a.x + b.x, a.y + b.y);
            z[at + half] = product(make_double2(a.x - b.x, a.y - b.y), roots[k * step]);
        }
    }
    __syncthreads();
}

// The inverse, but for the factor 1 / size, which cancels where it is used.
__device__ void transform_back(double2* z, const double2* __restrict__ roots, int size)
{
    for (int half = 1, step = size / 2; half < size; half *= 2, step /= 2) {
        __syncthreads();
        for (int n = threadIdx.x; n < size / 2; n += THREADS) {
            const int k = n & (half - 1), at = 2 * n - k;
            const double2 root = roots[k * step];
            const double2 a = z[at], b = product(z[at + half], make_double2(root.x, -root.y));
            z[at] = make_double2(a.x + b.x, a.y + b.y);
            z[at + half] = make_double2(a.x - b.x, a.y - b.y);
        }
    }
    __syncthreads();
}

// z = F * z, but for the factor 1 / padded, in place and by one block.
__device__ void blur(double2* z, const double* transfer, const double2* __restrict__ roots, int padded)
{
    transform(z, roots, padded);
    for (int n = threadIdx.x; n < padded; n += THREADS)
        z[n] = make_double2(z[n].x * transfer[n], z[n].y * transfer[n]);
    transform_back(z, roots, padded);
}

// What sharpening.expected_log_values and sharpening.sharpening_gain do, by one block. Out come the residuals u - E(u) at
// the bin centres, as value and step to the next bin, and the gain; the histogram is left empty for the next iteration.
// Log intensities are relative to `centre`. `roots` holds exp(-2 pi i k / padded).
extern "C" __global__ void sharpen(const int* __restrict__ done, const float* __restrict__ range, count64* counts,
                                   int bins, int padded, double fwhm, double noise, double twicing, int as_itk,
                                   double centre, const double2* __restrict__ roots, double* scratch, int in_shared,
                                   float2* lines, double* gain)
{
    if (*done)
        return;
    double* of_warp = reinterpret_cast<double*>(dynamic_shared);
    double2* z = reinterpret_cast<double2*>(in_shared ? of_warp + THREADS / WARP : scratch);
    double* transfer = reinterpret_cast<double*>(z + padded);
    double *sharp = transfer + padded, *density = sharp + padded, *expected = density + padded;
    const double low = range[0], slope = ((double)range[1] - low) / (bins - 1);
    const int offset = (padded - bins) / 2;
    if (!(slope > 0)) { // all values are the same: nothing is left to sharpen
        for (int bin = threadIdx.x; bin < bins; bin += THREADS) {
            counts[bin] = 0;
            if (bin < bins - 1)
                lines[bin] = make_float2(0.0f, 0.0f);
        }
        if (threadIdx.x == 0)
            *gain = 1;
        return;
    }

    const double ln2 = 0.693147180559945309, pi = 3.14159265358979324;
    const double width = as_itk ? fwhm / slope : fmax(fwhm / slope, NARROWEST_BINS), top = 2 * sqrt(ln2 / pi) / width;
    for (int n = threadIdx.x; n < padded; n += THREADS) {
        const double distance = min(n, padded - n) / width;
        z[n] = make_double2(top * exp(-4 * ln2 * distance * distance), 0.0);
    }
    transform(z, roots, padded);
    for (int n = threadIdx.x; n < padded; n += THREADS) {
        transfer[n] = z[n].x; // an even function has a real transform
        z[n] = make_double2(0.0, 0.0);
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < bins; bin += THREADS)
        z[offset + bin].x = (double)counts[bin] / SHARE_UNIT;
    transform(z, roots, padded);
    for (int n = threadIdx.x; n < padded; n += THREADS) {
        const double wiener = transfer[n] / (transfer[n] * transfer[n] + noise);
        z[n] = make_double2(z[n].x * wiener, z[n].y * wiener);
    }
    transform_back(z, roots, padded);
    // numerator and denominator are real: one transform does for both. In bins from the first one
    for (int n = threadIdx.x; n < padded; n += THREADS) {
        sharp[n] = fmax(z[n].x, 0.0);
        z[n] = make_double2((n - offset) * sharp[n], sharp[n]);
    }
    blur(z, transfer, roots, padded);
    double mine = 0;
    for (int n = threadIdx.x; n < padded; n += THREADS)
        mine = fmax(mine, z[n].y);
    const double least = as_itk ? 0.0 : NEXT_TO_NOTHING * block_joined<larger>(mine, of_warp);
    for (int n = threadIdx.x; n < padded; n += THREADS) {
        // 0 where there is next to nothing to divide by
        density[n] = (as_itk ? z[n].y != 0 : z[n].y > least) ? z[n].y : 0.0;
        expected[n] = density[n] != 0 ? z[n].x / density[n] : as_itk ? (-centre - low) / slope : (double)(n - offset);
    }
    for (int time = 0; twicing > 0 && time < TWICINGS; ++time) {
        __syncthreads();
        for (int n = threadIdx.x; n < padded; n += THREADS)
            z[n] = make_double2(expected[n], 0.0);
        blur(z, transfer, roots, padded);
        const double whole = transfer[0] * padded; // of F * 1
        for (int n = threadIdx.x; n < padded; n += THREADS)
            z[n] = make_double2((n - offset - z[n].x / whole) * sharp[n], 0.0);
        blur(z, transfer, roots, padded);
        for (int n = threadIdx.x; n < padded; n += THREADS)
            if (density[n] != 0)
                expected[n] += twicing * z[n].x / density[n];
    }
    __syncthreads();

    double voxels = 0, rise = 0;
    for (int bin = threadIdx.x; bin < bins; bin += THREADS) {
        const double left = (bin - expected[offset + bin]) * slope;
        if (bin == bins - 1)
            break;
        const double step = expected[offset + bin + 1] - expected[offset + bin];
        lines[bin] = make_float2((float)left, (float)((1 - step) * slope));
        const double between = (double)counts[bin] + (double)counts[bin + 1];
        voxels += between;
        rise += between * step;
    }
    voxels = block_joined<plus>(voxels, of_warp);
    rise = block_joined<plus>(rise, of_warp);
    if (threadIdx.x == 0)
        *gain = fmax(1 - rise / voxels, SMALLEST_GAIN);
    for (int bin = threadIdx.x; bin < bins; bin += THREADS)
        counts[bin] = 0;
}

// ---------------------------------------------------------------------------- fit

// The residual is gathered onto the lattice in three passes. First, from rows to planes: a thread adds
// up the voxels (i, ., k) of a group of GROUP_ROWS rows, each with its four weights along j. Sums of
// rows that begin at the same control point go into the same four slots; on to the next control point, the first of the four is complete.
// `width` is the length of a row, rounded up to whole warps.
extern "C" __global__ void gather_rows(const int* __restrict__ done, const float* __restrict__ range,
                                       const float* __restrict__ values, const float* __restrict__ weights,
                                       int weighted, const int64* __restrict__ row_base,
                                       const int2* __restrict__ row_ends, int planes, int rows, int length, int width,
                                       int groups, const int* __restrict__ group_rows,
                                       const int* __restrict__ group_slots, const int* __restrict__ columns,
                                       const float4* __restrict__ taps, const float2* __restrict__ lines, int bins,
                                       int slots, float* parts)
{
    if (*done)
        return;
    const int64 mine = (int64)blockIdx.x * THREADS + threadIdx.x, plane = mine / width / groups;
    const int k = (int)(mine % width), group = (int)(mine / width % groups);
    if (k >= length || plane >= planes)
        return;
    const float low = range[0], scale = range[2];
    float* out = parts + (plane * slots + group_slots[group]) * length + k;
    float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
    const int last = group_rows[group + 1];
    int column = columns[group_rows[group]];
    for (int first = group_rows[group]; first < last; first += AT_ONCE) {
        float value[AT_ONCE];
        for (int n = 0; n < AT_ONCE; ++n) { // all are on their way before the first is needed
            const int64 row = plane * rows + min(first + n, last - 1);
            const int2 ends = row_ends[row];
            const bool there = first + n < last && k >= ends.x && k < ends.y;
            value[n] = there ? values[row_base[row] + k] : __int_as_float(0x7fffffff); // NaN
        }
        for (int n = 0; n < AT_ONCE && first + n < last; ++n) {
            const int j = first + n;
            for (; column < columns[j]; ++column) {
                *out = sum0;
                out += length;
                sum0 = sum1;
                sum1 = sum2;
                sum2 = sum3;
                sum3 = 0;
            }
            if (is_nan(value[n]))
                continue;
            int bin;
            float fraction;
            bin_of(value[n], low, scale, bins, &bin, &fraction);
            const float2 line = lines[bin];
            float given = line.x + fraction * line.y;
            if (weighted)
                given *= weights[row_base[plane * rows + j] + k];
            const float4 weight = taps[j];
            sum0 += weight.x * given;
            sum1 += weight.y * given;
            sum2 += weight.z * given;
            sum3 += weight.w * given;
        }
    }
    out[0] = sum0;
    out[length] = sum1;
    out[2 * (int64)length] = sum2;
    out[3 * (int64)length] = sum3;
}

// Second, along k: a warp adds up one sum over a plane, for control points b along j and c
// along k. `reach` holds the first voxel from which on a control point begins: those of c are
// reach[c] .. reach[c + 4].
extern "C" __global__ void gather_planes(const int* __restrict__ done, const float* __restrict__ parts, int planes,
                                      int points_j, int points_k, int length, int groups, int slots,
                                      const int* __restrict__ group_rows, const int* __restrict__ group_slots,
                                      const int* __restrict__ columns_j, const int* __restrict__ columns_k,
                                      const int* __restrict__ reach, const double* __restrict__ taps, double* sums)
{
    if (*done)
        return;
    const int64 mine = (int64)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (mine >= (int64)planes * points_j * points_k)
        return; // the whole warp
    const int c = (int)(mine % points_k), b = (int)(mine / points_k % points_j);
    const int64 plane = mine / points_k / points_j;
    double sum = 0;
    for (int k = reach[c] + threadIdx.x % WARP; k < reach[c + 4]; k += WARP) {
        double of_column = 0;
        for (int group = 0; group < groups; ++group) {
            const int slot = b - columns_j[group_rows[group]];
            if (slot >= 0 && group_slots[group] + slot < group_slots[group + 1])
                of_column += parts[(plane * slots + group_slots[group] + slot) * length + k];
        }
        sum += of_column * taps[4 * (int64)k + c - columns_k[k]];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0)
        sums[mine] = sum;
}

// Third, along i: a warp adds up one control point, times a factor; `points` of them lie in a plane of the lattice.
extern "C" __global__ void gather_lattice(const int* __restrict__ done, const double* __restrict__ sums, int points_i,
                                          int points, const int* __restrict__ columns, const int* __restrict__ reach,
                                          const double* __restrict__ taps, const double* __restrict__ factors,
                                          double* lattice)
{
    if (*done)
        return;
    const int64 mine = (int64)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (mine >= (int64)points_i * points)
        return; // the whole warp
    const int a = (int)(mine / points), point = (int)(mine % points);
    double sum = 0;
    for (int i = reach[a] + threadIdx.x % WARP; i < reach[a + 4]; i += WARP)
        sum += sums[(int64)i * points + point] * taps[4 * (int64)i + a - columns[i]];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0)
        lattice[mine] = sum * factors[mine];
}

// What a warp makes of a row of a matrix (of `length` columns) times a vector: in the first lane.
__device__ double row_times(const double* __restrict__ matrix, int row, int length, const double* __restrict__ vector)
{
    double sum = 0;
    for (int n = threadIdx.x % WARP; n < length; n += WARP)
        sum += matrix[(int64)row * length + n] * vector[n];
    return warp_sum(sum);
}

// What fit.PenalisedLeastSquares.update does, mode by mode, a warp for each. `gathered` is per sample.
extern "C" __global__ void solve(const int* __restrict__ done, const double* __restrict__ of_points,
                                 const double* __restrict__ gathered, int modes, int points,
                                 const double* __restrict__ bending, const double* __restrict__ seen,
                                 const double* __restrict__ field, const double* __restrict__ gain,
                                 const double* __restrict__ bent, double penalty_of_stage, double* update)
{
    if (*done)
        return;
    const int mode = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (mode >= modes)
        return; // the whole warp
    const double wanted = row_times(of_points, mode, points, gathered);
    if (threadIdx.x % WARP == 0) {
        const double penalty = penalty_of_stage * *gain / sqrt(1 + *bent / BENT) * bending[mode];
        const double damping = fmin(fmax(*gain / FULLY_DAMPED_GAIN, LEAST_DAMPING), 1.0);
        update[mode] = (wanted - penalty * field[mode]) / (damping * seen[mode] + penalty);
    }
}

// The control points of these modes, a warp for each.
extern "C" __global__ void points_of_modes(const int* __restrict__ done, const double* __restrict__ to_points,
                                           const double* __restrict__ of_modes, int points, int modes, double* update)
{
    if (*done)
        return;
    const int point = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (point >= points)
        return; // the whole warp
    const double value = row_times(to_points, point, modes, of_modes);
    if (threadIdx.x % WARP == 0)
        update[point] = value;
}

// ---------------------------------------------------------------------------- evaluation

// Evaluate a lattice along i and k, but not yet along j: so few numbers that a thread for each will
// do. Control points lie `step_i`, `step_j` and `step_k` apart; `padded_j` of them are written, at
// least four, with 0 where there are none.
extern "C" __global__ void expand(const int* __restrict__ done, const double* __restrict__ lattice, int points_i,
                                  int points_j, int points_k, int step_i, int step_j, int step_k, int planes,
                                  int padded_j, int length, const int* __restrict__ columns_i,
                                  const double* __restrict__ taps_i, const int* __restrict__ columns_k,
                                  const double* __restrict__ taps_k, float* along)
{
    if (*done)
        return;
    const int64 mine = (int64)blockIdx.x * THREADS + threadIdx.x;
    if (mine >= (int64)planes * padded_j * length)
        return;
    const int k = (int)(mine % length), b = (int)(mine / length % padded_j), i = (int)(mine / length / padded_j);
    double value = 0;
    if (b < points_j)
        for (int p = 0; p < 4; ++p) {
            const int a = columns_i[i] + p;
            if (a >= points_i)
                break; // a flat axis has one control point
            double of_row = 0;
            for (int q = 0; q < 4; ++q) {
                const int c = columns_k[k] + q;
                if (c >= points_k)
                    break;
                of_row += taps_k[4 * (int64)k + q] * lattice[a * step_i + b * step_j + c * step_k];
            }
            value += taps_i[4 * (int64)i + p] * of_row;
        }
    along[mine] = (float)value;
}

// Subtract the update from all values; find the smallest and largest value and the sums of
// expm1(-update) and its square, block by block. A warp takes WARP_ROWS rows.
extern "C" __global__ void subtract(const int* __restrict__ done, const float* __restrict__ along, int64 all_rows,
                                    int rows, int length, int padded_j, const int* __restrict__ columns,
                                    const float4* __restrict__ taps, const int64* __restrict__ row_base,
                                    const int2* __restrict__ row_ends, float* values, float* extremes, double* sums)
{
    if (*done)
        return;
    const float infinity = __int_as_float(0x7f800000);
    float low = infinity, high = -infinity, total = 0, squares = 0;
    const int64 warp = (int64)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    for (int n = 0; n < WARP_ROWS; ++n) {
        const int64 row = warp * WARP_ROWS + n;
        if (row >= all_rows)
            break;
        const int j = (int)(row % rows);
        const float4 weight = taps[j];
        const float* line = along + (row / rows * padded_j + columns[j]) * length;
        const int2 ends = row_ends[row];
        float* of_row = values + row_base[row];
        for (int first = ends.x + threadIdx.x % WARP; first < ends.y; first += AT_ONCE * WARP) {
            float value[AT_ONCE];
            for (int n = 0; n < AT_ONCE; ++n) {
                const int k = first + n * WARP;
                value[n] = k < ends.y ? of_row[k] : __int_as_float(0x7fffffff); // NaN
            }
            for (int n = 0; n < AT_ONCE; ++n) {
                if (is_nan(value[n]))
                    continue;
                const int k = first + n * WARP;
                const float field = weight.x * line[k] + weight.y * line[k + (int64)length]
                    + weight.z * line[k + 2 * (int64)length] + weight.w * line[k + 3 * (int64)length];
                value[n] -= field;
                of_row[k] = value[n];
                const float change = expm1f(-field);
                low = fminf(low, value[n]);
                high = fmaxf(high, value[n]);
                total += change;
                squares += change * change;
            }
        }
    }
    Found found;
    found.low = low;
    found.high = high;
    found.total = total;
    found.squares = squares;
    found = block_found(found);
    if (threadIdx.x == 0) {
        extremes[2 * (int64)blockIdx.x] = found.low;
        extremes[2 * (int64)blockIdx.x + 1] = found.high;
        sums[2 * (int64)blockIdx.x] = found.total;
        sums[2 * (int64)blockIdx.x + 1] = found.squares;
    }
}

// The end of an iteration, by one block: join what the blocks of `subtract` found, add the update to
// the lattice and, where the fit has modes, to those, note how much changed, and decide whether the stage is done.
// `range` is low, high and bins per unit; `counters` are done and the number of iterations; `bent` is the penalty on
// the field, for the next iteration.
extern "C" __global__ void finish(int* counters, float* range, const float* __restrict__ extremes,
                                  const double* __restrict__ sums, int blocks, int64 voxels, int bins,
                                  double threshold, const double* __restrict__ update, int points, double* lattice,
                                  const double* __restrict__ bending, const double* __restrict__ mode_update, int modes,
                                  double* field, double* bent, double* cvs)
{
    if (counters[0])
        return;
    const float infinity = __int_as_float(0x7f800000);
    Found found;
    found.low = infinity;
    found.high = -infinity;
    found.total = 0;
    found.squares = 0;
    for (int n = threadIdx.x; n < blocks; n += THREADS) {
        Found other;
        other.low = extremes[2 * (int64)n];
        other.high = extremes[2 * (int64)n + 1];
        other.total = sums[2 * (int64)n];
        other.squares = sums[2 * (int64)n + 1];
        found = joined(found, other);
    }
    for (int n = threadIdx.x; n < points; n += THREADS)
        lattice[n] += update[n];
    double of_modes = 0;
    for (int n = threadIdx.x; n < modes; n += THREADS) {
        field[n] += mode_update[n];
        of_modes += bending[n] * field[n] * field[n];
    }
    of_modes = block_joined<plus>(of_modes, reinterpret_cast<double*>(dynamic_shared));
    __syncthreads();
    found = block_found(found); // its barrier: all have read the counters before they change
    if (threadIdx.x == 0) {
        *bent = of_modes;
        const double variance = (found.squares - found.total * found.total / voxels) / (voxels - 1);
        const double cv = sqrt(fmax(variance, 0.0)) / (1 + found.total / voxels);
        range[0] = found.low;
        range[1] = found.high;
        range[2] = (float)((bins - 1) / ((double)found.high - (double)found.low));
        cvs[counters[1]] = cv;
        counters[1] += 1;
        counters[0] = cv <= threshold || found.low == found.high;
    }
}

// Divide an image by the exponential of the field, of which `expand` has made `along`: a thread
// takes the voxels (i, ., k) of STRETCH rows. Image and results may be one array: a voxel is read
// before it is written. Steps are between the elements of each array along i, j and k.
extern "C" __global__ void divide(const float* __restrict__ along, int planes, int rows, int length,
                                  int width, int padded_j, int stretches, const int* __restrict__ columns,
                                  const float4* __restrict__ taps, const float* image, int64 image_i, int64 image_j,
                                  int64 image_k, float* corrected, int64 corrected_i, int64 corrected_j,
                                  int64 corrected_k, float* ratio, int64 ratio_i, int64 ratio_j, int64 ratio_k)
{
    const int64 mine = (int64)blockIdx.x * THREADS + threadIdx.x, plane = mine / width / stretches;
    const int k = (int)(mine % width), stretch = (int)(mine / width % stretches);
    if (k >= length || plane >= planes)
        return;
    const float* line = along + plane * padded_j * length + k;
    image += plane * image_i + k * image_k;
    corrected += plane * corrected_i + k * corrected_k;
    ratio += plane * ratio_i + k * ratio_k;
    const int end = min(rows, (stretch + 1) * STRETCH);
    int column = -1;
    float at0 = 0, at1 = 0, at2 = 0, at3 = 0;
    for (int first = stretch * STRETCH; first < end; first += AT_ONCE) {
        float before[AT_ONCE], field[AT_ONCE];
        for (int n = 0; n < AT_ONCE; ++n)
            before[n] = first + n < end ? image[(first + n) * image_j] : 0.0f;
        for (int n = 0; n < AT_ONCE; ++n) {
            const int j = min(first + n, end - 1);
            if (columns[j] != column) {
                column = columns[j];
                at0 = line[(int64)column * length];
                at1 = line[(int64)(column + 1) * length];
                at2 = line[(int64)(column + 2) * length];
                at3 = line[(int64)(column + 3) * length];
            }
            const float4 weight = taps[j];
            field[n] = expf(weight.x * at0 + weight.y * at1 + weight.z * at2 + weight.w * at3);
        }
        for (int n = 0; n < AT_ONCE; ++n)
            if (first + n < end) {
                corrected[(first + n) * corrected_j] = before[n] / field[n];
                ratio[(first + n) * ratio_j] = field[n];
            }
    }
}
