// Layers, neurons and products of spikes, forward and backward, in one call each: what plain.py
// says, by the kernels of fused.cu and, on a CPU, the sums of events.cpp. native.py has the plans.
//
// Tensors are [T, B, C, H, W] with channels innermost; T is 1 for an image that is shown T times.
// For the backward pass a layer saves its input, spikes as bits or bytes, and its convolution's
// output, unless memory is small. `norm` is [5, C] of BatchNorm: mean, unbiased variance, 1 /
// standard deviation, and the scale and shift with which it maps y to scale * y + shift; a kernel
// in evaluation reads the last two alone. `rates` [C] are PLIF's.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cstring>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using In = const Tensor&;

const auto LAST = at::MemoryFormat::ChannelsLast;
const int NO_CONTEXT = 201;  // of CUDA's errors
// Above this share of inputs that are not 0 the dense gradient of the weight takes less time.
const double DENSE = 0.4;

// As in native.py, whose NAMES are the kernels. On a CPU `grid` holds the parts of a sum alone, on
// a GPU columns for all layers: those that a layer does not need write nothing.
struct Kernel {
    void* address;
    unsigned grid[2], block[2];
};

enum { STATISTICS, BATCH_NORM, RUNNING_NORM, POOL, FIRE, FIRE_BACKWARD, BATCH_NORM_BACKWARD,
       POOL_BACKWARD, NORMALISE_BACKWARD, KERNELS };

// Of a convolution, as in events.cpp
struct Shape {
    long images, height, width, channels, out_height, out_width, out_channels;
    long kernel[2], stride[2], padding[2];
};

// The addresses of its functions; null for dense convolutions.
struct Events {
    long (*find)(long rows, long size, const void* x, bool bytes, void* bits);
    void (*convolve)(const Shape*, const void* x, bool bytes, const void* weight, void* y,
                     long threads);
    void (*unpack)(long rows, long size, const void* bits, void* x);
    void (*weight_gradient)(const Shape*, const void* bits, const void* values, bool bytes,
                            const void* grad, void* out, long threads);
};

struct Plan {
    // CUDA's cuLaunchKernel; null on a CPU.
    int (*driver)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                  void*, void**, void**);
    Kernel kernels[KERNELS];
    Events events;
    Shape shape;
    const int64_t* channels;  // of each layer
    const double* momenta;
    // T: steps of the neuron, 1 without one. steps: of x, each of which counts `repeats` times.
    int64_t layers, has_bias, training, pool, fires, small, T, steps, repeats;
    double eps, rate, threshold, alpha;
};

// Launches ---------------------------------------------------------------------------------------

void* address(In x) { return x.defined() ? const_cast<void*>(x.const_data_ptr()) : nullptr; }

// An argument of a kernel that computes in Real
template <class Real>
Real in_c(double value) { return value; }
template <class Real>
long long in_c(int64_t value) { return value; }
template <class Real>
void* in_c(In x) { return address(x); }

// A pass through layers or a neuron in `dtype`, on a CUDA stream or a CPU
struct Pass {
    const Plan& plan;
    at::ScalarType dtype;
    at::Device device;
    void* stream;

    at::ScalarType real() const { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

    template <class... Args>
    void run(int index, const Args&... args) const {
        const Kernel& kernel = plan.kernels[index];
        dtype == at::kDouble ? launch<double>(kernel, args...) : launch<float>(kernel, args...);
    }

    template <class Real, class... Args>
    void launch(const Kernel& kernel, const Args&... args) const {
        auto values = std::make_tuple(in_c<Real>(args)...);
        if (!plan.driver) {
            using Function = void(decltype(in_c<Real>(args))...);
            return std::apply(reinterpret_cast<Function*>(kernel.address), values);
        }
        // Of each a kernel reads as many bytes as its parameter has.
        void* places[sizeof...(args)];
        void** place = places;
        std::apply([&](auto&... value) { ((*place++ = &value), ...); }, values);
        const unsigned *grid = kernel.grid, *block = kernel.block;
        const auto start = [&] {
            return plan.driver(kernel.address, grid[0], grid[1], 1, block[0], block[1], 1, 0,
                               stream, places, nullptr);
        };
        int code = start();
        if (code == NO_CONTEXT) {  // in a thread in which PyTorch has run no kernel yet
            at::zeros({1}, at::TensorOptions(device));
            code = start();
        }
        TORCH_CHECK(code == 0, "CUDA refuses to launch a kernel (error ", code, ")");
    }

    int64_t parts(int index) const { return plan.kernels[index].grid[1]; }
};

// `plan`: its bytes. A node of autograd keeps them, and so the Plan.
Pass pass_of(In plan, at::ScalarType dtype, at::Device device, int64_t stream) {
    const void* place = plan.const_data_ptr();
    return {*static_cast<const Plan*>(place), dtype, device, reinterpret_cast<void*>(stream)};
}

// Layouts ----------------------------------------------------------------------------------------

Tensor empty(at::IntArrayRef shape, In like, at::ScalarType dtype) {
    return at::empty(shape, like.options().dtype(dtype));
}

// [T, B, C, H, W] or [N, C, H, W] -> [N, C, H, W] in channels_last; copied only if need be
Tensor rows(In x) { return x.flatten(0, -4).contiguous(LAST); }

// [T*B, C, H, W] -> [T, B, C, H, W]
Tensor steps(In y, int64_t T) {
    return y.view({T, y.size(0) / T, y.size(1), y.size(2), y.size(3)});
}

// A GPU loads several neighbours at once; a gradient may begin anywhere.
Tensor aligned(In x) { return uintptr_t(x.const_data_ptr()) % 16 ? x.clone() : x; }

// Convolutions of spikes -------------------------------------------------------------------------

bool is_bytes(In x) { return x.defined() && x.scalar_type() == at::kByte; }

// x is of the kernel's type, or whole numbers as bytes.
Tensor convolve_events(In x, In kernel, const Plan& plan) {
    const Shape& s = plan.shape;
    const Tensor weight = kernel.contiguous(LAST);
    const Tensor y = at::empty({s.images, s.out_channels, s.out_height, s.out_width},
                               kernel.options().memory_format(LAST));
    plan.events.convolve(&s, x.const_data_ptr(), is_bytes(x), weight.const_data_ptr(),
                         y.data_ptr(), at::get_num_threads());
    return y;
}

// What waits in the place of x: {x as it is `saved`, or nothing where the bits tell all of it; bits
// of the places that are not 0, or nothing where too few are 0}
std::array<Tensor, 2> find_events(In x, In saved, const Plan& plan) {
    if (!plan.events.find) return {saved, {}};
    const int64_t count = x.size(0) * x.size(2), size = x.size(3) * x.size(1);
    const Tensor bits = at::empty({count, (size + 63) / 64}, x.options().dtype(at::kLong));
    const long found = plan.events.find(count, size, x.const_data_ptr(), is_bytes(x),
                                        bits.data_ptr());
    if (std::abs(found) > DENSE * x.numel()) return {saved, {}};
    return {found < 0 ? x : Tensor(), bits};
}

// Memory for x
Tensor images(const Shape& s, at::TensorOptions options) {
    return at::empty({s.images, s.channels, s.height, s.width}, options.memory_format(LAST));
}

// The x whose bits these are
Tensor unpack(In bits, const Plan& plan) {
    const Tensor x = images(plan.shape, bits.options().dtype(at::kByte));
    plan.events.unpack(x.size(0) * x.size(2), x.size(3) * x.size(1), bits.const_data_ptr(),
                       x.data_ptr());
    return x;
}

Tensor weight_gradient(In bits, In saved, In grad, In kernel, const Plan& plan) {
    const Tensor x = saved.defined() ? rows(saved) : saved;
    const Tensor out = at::empty_like(kernel, kernel.options().memory_format(LAST));
    plan.events.weight_gradient(&plan.shape, bits.const_data_ptr(), address(x), is_bytes(x),
                                grad.const_data_ptr(), out.data_ptr(), at::get_num_threads());
    return out;
}

// The forward pass -------------------------------------------------------------------------------

// Of each layer, see can_fuse in fusible.py; a layer without a bias has its weight in that place.
enum { WEIGHT, BIAS, GAMMA, BETA, MEAN, VAR, BATCHES, TENSORS };

Tensor weight_of(at::TensorList tensors, const Plan& plan) {
    if (plan.layers == 1) return tensors[WEIGHT];
    std::vector<Tensor> weights;
    for (int64_t i = 0; i < plan.layers; ++i) weights.push_back(tensors[i * TENSORS + WEIGHT]);
    return at::cat(weights);
}

// The weight of a Conv1d as that of a Conv2d
Tensor kernel_of(In weight) { return weight.dim() == 4 ? weight : weight.unsqueeze(3); }

// [T*B, C', H', W'] in channels_last, without a bias
Tensor convolve(In x, In kernel, const Pass& pass) {
    const Plan& plan = pass.plan;
    if (plan.events.convolve) return convolve_events(rows(x), kernel, plan);
    const Tensor cast = kernel.to(pass.dtype, false, false, LAST);
    return at::convolution(rows(x.to(pass.dtype)), cast, {}, plan.shape.stride, plan.shape.padding,
                           {1, 1}, false, {0, 0}, 1).contiguous(LAST);
}

// {maxima of the BatchNorm's output, or minima of its input where that turns them round; where they
// are from, if asked}
std::array<Tensor, 2> max_pool(In y, In norm, bool with_taps, const Pass& pass) {
    const int64_t C = y.size(1), H = y.size(2), W = y.size(3);
    Tensor pooled = at::empty({y.size(0), C, (H + 1) / 2, (W + 1) / 2},
                              y.options().memory_format(LAST));
    Tensor taps = with_taps ? at::empty_like(pooled, at::kByte) : Tensor();
    pass.run(POOL, pooled.numel() / C, C, H, W, y, norm, pooled, taps);
    return {pooled, taps};
}

// [5, C] of BatchNorm, whose running statistics move on in training
Tensor norm_of(In y, at::TensorList tensors, const Pass& pass) {
    const Plan& plan = pass.plan;
    const int64_t C = y.size(1), count = y.numel() / C, parts = pass.parts(STATISTICS);
    const Tensor norm = empty({5, C}, y, pass.real());
    Tensor partial;
    if (plan.training) {
        partial = empty({parts, 2, C}, y, pass.real());
        pass.run(STATISTICS, count, C, parts, y, partial);
    }
    for (int64_t i = 0, start = 0; i < plan.layers; start += plan.channels[i++]) {
        const Tensor* own = &tensors[i * TENSORS];
        const Tensor bias = plan.has_bias ? own[BIAS] : Tensor();
        if (plan.training)
            pass.run(BATCH_NORM, plan.channels[i], C, start, parts, count, plan.repeats, plan.eps,
                     plan.momenta[i], y, partial, own[GAMMA], own[BETA], bias, norm, own[MEAN],
                     own[VAR], own[BATCHES]);
        else
            pass.run(RUNNING_NORM, plan.channels[i], C, start, plan.eps, own[MEAN], own[VAR], bias,
                     own[GAMMA], own[BETA], norm);
    }
    return norm;
}

// Spikes of y into memory of `out`: {spikes and, if they are wanted, as bytes}; without a neuron
// {BatchNorm's output}.
void fire(In y, const variable_list& out, In norm, In rates, const Pass& pass) {
    const Plan& plan = pass.plan;
    const Tensor spikes = out[0], bytes = out.size() > 1 ? out[1] : Tensor();
    const int64_t C = norm.size(1), count = spikes.numel() / (plan.T * C);
    const int64_t step = y.numel() == spikes.numel() ? count * C : 0;
    pass.run(FIRE, count, C, step, y, spikes, bytes, norm, rates, plan.rate, plan.threshold);
}

// What follows BatchNorm, see fire, of all steps. In evaluation it may be written over y.
variable_list outputs(In y, In norm, In rates, bool bytes, const Pass& pass) {
    const Plan& plan = pass.plan;
    const int64_t T = plan.fires ? plan.T : plan.steps, images = y.size(0) / plan.steps * T;
    const auto memory = [&](at::ScalarType dtype) {
        return at::empty({images, y.size(1), y.size(2), y.size(3)},
                         y.options().dtype(dtype).memory_format(LAST));
    };
    const bool over = !plan.training && y.size(0) == images;
    variable_list out = {over ? y : memory(pass.dtype)};
    if (bytes) out.push_back(memory(at::kByte));
    fire(y, out, norm, rates, pass);
    for (Tensor& each : out) each = steps(each, T);
    return out;
}

// The backward pass ------------------------------------------------------------------------------

// Writes the gradient of scale * y + shift into grad, which is like y; `spikes` is that of the
// spikes. Without a neuron both are the same, and nothing is written. Returns [parts, 2, C], whose
// sums over parts are those of that gradient and of its product with y - mean; with `rates`
// [parts, 3, C], the last for their gradient.
Tensor fire_backward(In spikes, In y, In grad, In norm, In rates, const Pass& pass) {
    const Plan& plan = pass.plan;
    const int64_t C = norm.size(1), parts = pass.parts(FIRE_BACKWARD);
    const int64_t count = spikes.numel() / (plan.T * C);
    const int64_t step = y.numel() == spikes.numel() ? count * C : 0;
    const Tensor partial = empty({parts, rates.defined() ? 3 : 2, C}, y, pass.real());
    pass.run(FIRE_BACKWARD, count, C, parts, step, y, spikes, grad, norm, rates, plan.rate,
             plan.threshold, plan.alpha, partial);
    return partial;
}

// What the forward pass has saved. No guard may be set yet: a checkpoint's hooks run layers.
variable_list saved_in(AutogradContext* ctx) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "fused layers have no second derivative; fused: false "
                "gives one");
    return ctx->get_saved_variables();
}

void keep(AutogradContext* ctx, In plan, int64_t stream) {
    ctx->saved_data["plan"] = plan;
    ctx->saved_data["stream"] = stream;
    ctx->set_materialize_grads(false);  // none of the bytes
}

// The pass back, in the type that the forward pass had: grad's, if it is defined.
Pass pass_of(AutogradContext* ctx, In grad, at::Device device) {
    return pass_of(ctx->saved_data["plan"].toTensor(), grad.scalar_type(), device,
                   ctx->saved_data["stream"].toInt());
}

// In a backward pass types are those of the forward pass, whatever autocast is now; the device is
// the gradient's.
struct Backward {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard without{c10::autocast_dispatch_keyset};
    c10::DeviceGuard device;

    explicit Backward(In grad) : device(grad.device()) {}
};

// a.t() @ b, on a GPU in float32 sums: those in float16 are too coarse for so many rows.
Tensor sum_over_rows(In a, In b) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
    if (a.is_cuda() && a.scalar_type() != at::kFloat) return at::mm(a.t(), b, at::kFloat);
#endif
    return at::mm(a.t(), b);
}

// {gradient of x [T*B, C, H, W], of the kernel}, where they are wanted
std::array<Tensor, 2> convolution_backward(In grad, In x, In weight, const Plan& plan,
                                           std::array<bool, 2> wanted) {
    if (!wanted[0] && !wanted[1]) return {};
    const at::IntArrayRef stride = plan.shape.stride, padding = plan.shape.padding;
    const Tensor kernel = weight.to(grad.scalar_type()).contiguous(LAST);
    // On a CPU oneDNN's convolution is as fast as MKL's product, and faster where MKL leaves
    // AVX-512 out. It has none in float64, and that of PyTorch 2.11 crashes at stride 2 and few
    // channels.
    const bool products = grad.is_cuda() || grad.scalar_type() == at::kDouble ||
                          stride[0] != 1 || stride[1] != 1;
    if (!products || kernel.size(2) != 1 || kernel.size(3) != 1 || padding[0] || padding[1]) {
        auto [grad_x, grad_kernel, _] = at::convolution_backward(
            grad, x, kernel, {}, stride, padding, {1, 1}, false, {0, 0}, 1,
            {wanted[0], wanted[1], false});
        return {grad_x, grad_kernel};
    }
    const auto seen = [&](In all) {
        return all.slice(2, 0, {}, stride[0]).slice(3, 0, {}, stride[1]);
    };
    const auto flat = [](In y) { return y.permute({0, 2, 3, 1}).reshape({-1, y.size(1)}); };
    const Tensor grads = flat(grad);
    Tensor grad_x, grad_kernel;
    if (wanted[1]) grad_kernel = sum_over_rows(grads, flat(seen(x)));
    if (wanted[0]) {
        grad_x = at::zeros_like(x);
        const auto some = seen(grad_x).permute({0, 2, 3, 1});
        some.copy_(at::mm(grads, kernel.flatten(1)).view(some.sizes()));
    }
    return {grad_x, grad_kernel};
}

struct ConvBNLIF : torch::autograd::Function<ConvBNLIF> {
    // {spikes of T steps, and as bytes where x is saved}, or BatchNorm's output for the steps of x.
    // ctx: only where x is saved.
    static variable_list forward(AutogradContext* ctx, In x, const std::optional<Tensor>& saved,
                                 const std::optional<Tensor>& rates_, at::TensorList tensors,
                                 at::ScalarType dtype, In plan_bytes, int64_t stream) {
        at::AutoDispatchBelowADInplaceOrView below;
        const Pass pass = pass_of(plan_bytes, dtype, x.device(), stream);
        const Plan& plan = pass.plan;
        const Tensor weight = weight_of(tensors, plan), rates = rates_.value_or(Tensor());
        const Tensor input = plan.events.convolve ? rows(saved.value_or(x)) : x;
        const Tensor y = convolve(input, kernel_of(weight), pass);
        const Tensor norm = norm_of(y, tensors, pass);
        const Tensor pooled = plan.pool ? max_pool(y, norm, false, pass)[0] : y;
        if (saved) {
            const auto [kept, bits] = find_events(input, *saved, plan);
            ctx->save_for_backward({kept, bits, plan.small ? Tensor() : y, weight, rates, norm});
            keep(ctx, plan_bytes, stream);
        }
        return outputs(pooled, norm, rates, saved && plan.fires, pass);
    }

    static variable_list backward(AutogradContext* ctx, variable_list grads) {
        const auto saved = saved_in(ctx);
        const Pass pass = pass_of(ctx, grads[0], saved[3].device());
        const Plan& plan = pass.plan;
        variable_list found(6 + plan.layers * TENSORS);
        if (!grads[0].defined()) return found;
        const Backward context(grads[0]);
        const auto plain = [](In x) { return x.defined() ? x.contiguous() : x; };
        const Tensor x = saved[0], bits = plain(saved[1]), weight = saved[3];
        const Tensor kernel = kernel_of(weight), rates = plain(saved[4]), norm = plain(saved[5]);
        const Tensor y = plan.small ? convolve(x.defined() ? x : unpack(bits, plan), kernel, pass)
                                    : saved[2].contiguous(LAST);
        const int64_t C = y.size(1), count = y.numel() / C;
        const auto [pooled, taps] =
            plan.pool ? max_pool(y, norm, true, pass) : std::array<Tensor, 2>{y};
        const Tensor spikes = aligned(grads[0].permute({0, 1, 3, 4, 2}).contiguous());
        const Tensor grad = plan.fires ? at::empty_like(pooled)
                                       : spikes.flatten(0, 1).permute({0, 3, 1, 2});
        const Tensor partial = fire_backward(spikes, pooled, grad, norm, rates, pass);
        const Tensor sums = empty({7, C}, y, pass.real());
        pass.run(BATCH_NORM_BACKWARD, C, partial.size(0), partial.size(1), count, partial, norm,
                 sums);
        const Tensor grad_y = plan.fires && !plan.pool ? grad : at::empty_like(y);
        if (plan.pool)
            pass.run(POOL_BACKWARD, count, C, y.size(2), y.size(3), y, grad, taps, grad_y, sums);
        else
            pass.run(NORMALISE_BACKWARD, count, C, y, grad, grad_y, sums);

        const bool wanted = ctx->needs_input_grad(0), by_bits = bits.defined();
        const Tensor input = by_bits ? images(plan.shape, grad_y.options())  // its shape counts
                                     : rows(x.to(pass.dtype));
        auto [grad_x, grad_weight] =
            convolution_backward(grad_y, input, kernel, plan, {wanted, !by_bits});
        if (by_bits) grad_weight = weight_gradient(bits, x, grad_y, kernel, plan);
        // In the layout of the weight, as DistributedDataParallel wants a parameter's gradient.
        grad_weight = grad_weight.view_as(weight).to(weight.scalar_type());
        if (grad_weight.strides() != weight.strides())
            grad_weight = at::empty_like(weight).copy_(grad_weight);
        // Not every convolution leaves channels innermost.
        if (wanted) found[0] = steps(grad_x.contiguous(LAST), plan.steps);
        const auto each_sum = sums.unbind();
        if (rates.defined()) found[2] = each_sum[2];
        for (int64_t i = 0, start = 0; i < plan.layers; start += plan.channels[i++]) {
            const auto own = [&](In all) {
                return plan.layers == 1 ? all : all.narrow(0, start, plan.channels[i]);
            };
            Tensor* const of_layer = &found[3 + i * TENSORS];
            of_layer[WEIGHT] = own(grad_weight);
            // BatchNorm subtracts the bias again: its gradient is 0, in the plain path rounding
            // errors.
            if (plan.has_bias) of_layer[BIAS] = own(each_sum[6]);
            of_layer[GAMMA] = own(each_sum[1]);
            of_layer[BETA] = own(each_sum[0]);
        }
        return found;
    }
};

variable_list layer(In x, const std::optional<Tensor>& saved, const std::optional<Tensor>& rates,
                    at::TensorList tensors, at::ScalarType dtype, In plan, int64_t stream) {
    // Types are those of autocast already.
    c10::impl::ExcludeDispatchKeyGuard without(c10::autocast_dispatch_keyset);
    const c10::DeviceGuard device(x.device());
    return saved ? ConvBNLIF::apply(x, saved, rates, tensors, dtype, plan, stream)
                 : ConvBNLIF::forward(nullptr, x, saved, rates, tensors, dtype, plan, stream);
}

// Neurons ----------------------------------------------------------------------------------------

// Memory for T steps, the steps outermost and the rest in x's order
Tensor like_steps(In x, int64_t T, at::ScalarType dtype) {
    auto sizes = x.sizes().vec(), strides = x.strides().vec();
    sizes[0] = T, strides[0] = x.numel() / x.size(0);
    return at::empty_strided(sizes, strides, x.options().dtype(dtype));
}

// x in such memory, copied only if need be
Tensor in_steps(In x) {
    if (!x.select(0, 0).is_non_overlapping_and_dense()) return x.contiguous();
    const bool outermost = x.size(0) == 1 || x.stride(0) == x.numel() / x.size(0);
    return outermost ? x : like_steps(x, x.size(0), x.scalar_type()).copy_(x);
}

// A neuron alone, of any shape: a layer's kernels, with a BatchNorm of scale 1 and shift 0, and
// rows of the Plan's channels. x has T steps, or one that stands for all; PLIF's rate is the
// layer's.
struct Fire : torch::autograd::Function<Fire> {
    static Tensor identity(In x, const Pass& pass) {
        const Tensor norm = at::zeros({5, *pass.plan.channels}, x.options().dtype(pass.real()));
        norm[3].fill_(1);
        return norm;
    }

    static Tensor rates_of(In rate, const Pass& pass) {
        return rate.defined() ? rate.expand({*pass.plan.channels}).contiguous() : rate;
    }

    // {spikes, and as bytes, if they are wanted}
    static variable_list forward(AutogradContext* ctx, In x, const std::optional<Tensor>& rate_,
                                 bool bytes, In plan, int64_t stream) {
        at::AutoDispatchBelowADInplaceOrView below;
        const Pass pass = pass_of(plan, x.scalar_type(), x.device(), stream);
        const Tensor y = in_steps(x), rate = rate_.value_or(Tensor());
        variable_list out = {like_steps(y, pass.plan.T, pass.dtype)};
        if (bytes) out.push_back(like_steps(y, pass.plan.T, at::kByte));
        fire(y, out, identity(y, pass), rates_of(rate, pass), pass);
        ctx->save_for_backward({x, rate});
        keep(ctx, plan, stream);
        return out;
    }

    static variable_list backward(AutogradContext* ctx, variable_list grads) {
        const auto saved = saved_in(ctx);
        if (!grads[0].defined()) return variable_list(5);
        const Backward context(grads[0]);
        const Pass pass = pass_of(ctx, grads[0], grads[0].device());
        const Tensor y = in_steps(saved[0]), rates = rates_of(saved[1], pass);
        Tensor spikes = like_steps(y, pass.plan.T, pass.dtype);
        spikes = grads[0].strides() == spikes.strides() ? grads[0] : spikes.copy_(grads[0]);
        const Tensor grad = at::empty_like(y);
        const Tensor norm = identity(y, pass);
        const Tensor sums = fire_backward(aligned(spikes), y, grad, norm, rates, pass);
        const Tensor of_rate = rates.defined() ? sums.select(1, 2).sum(at::kDouble) : Tensor();
        return {grad, of_rate, {}, {}, {}};
    }
};

variable_list fire_alone(In x, const std::optional<Tensor>& rate, bool bytes, In plan,
                         int64_t stream) {
    const c10::DeviceGuard device(x.device());
    return Fire::apply(x, rate, bytes, plan, stream);
}

// Products ---------------------------------------------------------------------------------------

// a @ b of [T, B, heads, rows, depth] and [T, B, heads, depth, columns] by events.cpp's `multiply`:
// a row's sums do not depend on the others, and what is 0 in a takes no time.
Tensor multiply(In a_, In b_, int64_t function) {
    const Tensor a = a_.stride(3) == 1 || a_.stride(4) == 1 ? a_ : a_.contiguous();
    const Tensor b = b_.stride(4) == 1 ? b_ : b_.contiguous();
    const int64_t T = a.size(0), B = a.size(1), heads = a.size(2), rows = a.size(3);
    const Tensor out = at::empty({T, B, rows, heads, b.size(4)}, a.options()).transpose(2, 3);
    std::vector<long> sizes = {T, B, heads, rows, a.size(4), b.size(4)};
    for (const auto& strides : {a.strides(), b.strides(), out.strides()})
        sizes.insert(sizes.end(), strides.begin(), strides.end());
    using Function = void(const long*, const void*, const void*, void*);
    reinterpret_cast<Function*>(function)(sizes.data(), a.const_data_ptr(), b.const_data_ptr(),
                                          out.data_ptr());
    return out;
}

// The backward pass reads `saved_a` and `saved_b`, which may be bytes, in the place of a and b.
struct Product : torch::autograd::Function<Product> {
    static Tensor forward(AutogradContext* ctx, In a, In b, In saved_a, In saved_b, bool matmul,
                          int64_t function) {
        at::AutoDispatchBelowADInplaceOrView below;
        ctx->save_for_backward({saved_a, saved_b});
        ctx->saved_data["matmul"] = matmul;
        if (function) return multiply(a, b, function);
        return matmul ? at::matmul(a, b) : at::mul(a, b);
    }

    static variable_list backward(AutogradContext* ctx, variable_list grads) {
        const auto saved = saved_in(ctx);
        at::AutoDispatchBelowADInplaceOrView below;
        const Tensor& grad = grads[0];
        const bool matmul = ctx->saved_data["matmul"].toBool();
        const auto cast = [&](In x) {
            const Tensor y = x.to(grad.scalar_type());
            return matmul ? y.contiguous() : y;  // as its batches are read: it would copy them else
        };
        const Tensor a = cast(saved[0]), b = cast(saved[1]);
        const Tensor grad_a = matmul ? at::matmul(grad, b.mT()) : grad * b;
        const Tensor grad_b = matmul ? at::matmul(a.mT(), grad) : grad * a;
        return {at::sum_to(grad_a, a.sizes()), at::sum_to(grad_b, b.sizes()), {}, {}, {}, {}};
    }
};

Tensor product(In a, In b, In saved_a, In saved_b, bool matmul, int64_t function) {
    return Product::apply(a, b, saved_a, saved_b, matmul, function);
}

TORCH_LIBRARY_FRAGMENT(NAMESPACE, m) {
    m.def("layer", TORCH_FN(layer));
    m.def("fire", TORCH_FN(fire_alone));
    m.def("product", TORCH_FN(product));
}
