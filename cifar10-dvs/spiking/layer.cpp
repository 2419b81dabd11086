// Layers, neurons and products of spikes in one call each, for GPUs: what ConvBNLIF and fused_layers
// of layer.py, Neuron of neuron.py and Product of spikes.py do, with no Python between kernels.
// native.py compiles this and makes the plans. Names are those of Python.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cstring>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using In = const Tensor&;

const auto LAST = at::MemoryFormat::ChannelsLast;

// As in native.py, whose NAMES are the kernels.
struct Kernel {
    void* address;
    unsigned grid[2], block[2];
};

enum { STATISTICS, BATCH_NORM, RUNNING_NORM, POOL, FIRE, NORMALISE, FIRE_BACKWARD, GRADIENT_SUMS,
       BATCH_NORM_BACKWARD, POOL_BACKWARD, NORMALISE_BACKWARD, INTEGRATE, INTEGRATE_BACKWARD,
       KERNELS };

struct Plan {
    int (*driver)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                  void*, void**, void**);
    Kernel kernels[KERNELS];
    const int64_t* channels;  // of each layer
    const double* momenta;
    int64_t layers, has_bias, training, product, pool, fires, small, T, columns, stride[2],
        padding[2];
    double eps, rate, threshold, alpha;
};

// Launches ---------------------------------------------------------------------------------------

// Eight bytes, of which a kernel reads as many as its parameter has.
int64_t slot(int64_t value) { return value; }
int64_t slot(In x) { return x.defined() ? int64_t(x.const_data_ptr()) : 0; }
int64_t slot(double value) {
    const float single = value;
    int64_t bits = 0;
    std::memcpy(&bits, &single, sizeof single);
    return bits;
}

// A pass through layers or a neuron in `dtype`, on a CUDA stream
struct Pass {
    const Plan& plan;
    at::ScalarType dtype;
    void* stream;

    template <class... Args>
    void run(int index, const Args&... args) const {
        const Kernel& kernel = plan.kernels[index];
        launch(kernel, kernel.grid[0], args...);
    }

    // A kernel in which a column of threads works on each of so many channels.
    template <class... Args>
    void columns(int index, int64_t channels, const Args&... args) const {
        const int64_t across = (channels + plan.columns - 1) / plan.columns;
        launch(plan.kernels[index], across, channels, args...);
    }

    template <class... Args>
    void launch(const Kernel& kernel, unsigned across, const Args&... args) const {
        int64_t slots[] = {slot(args)...};
        void* places[sizeof...(args)];
        for (size_t i = 0; i < sizeof...(args); ++i) places[i] = slots + i;
        const unsigned *grid = kernel.grid, *block = kernel.block;
        const int code = plan.driver(kernel.address, across, grid[1], 1, block[0], block[1], 1, 0,
                                     stream, places, nullptr);
        TORCH_CHECK(code == 0, "CUDA refuses to launch a kernel (error ", code, ")");
    }

    int64_t parts(int index) const { return plan.kernels[index].grid[1]; }
};

Pass pass_of(int64_t plan, at::ScalarType dtype, int64_t stream) {
    return {*reinterpret_cast<Plan*>(plan), dtype, reinterpret_cast<void*>(stream)};
}

// Layouts ----------------------------------------------------------------------------------------

Tensor empty(at::IntArrayRef shape, In like, at::ScalarType dtype) {
    return at::empty(shape, like.options().dtype(dtype));
}

// [T, B, C, H, W] -> [T*B, C, H, W] in channels_last
Tensor rows(In x) { return x.flatten(0, 1).contiguous(LAST); }

// [T, B, C, H, W] -> [T*B*H*W, C]
Tensor pixels(In x) { return x.permute({0, 1, 3, 4, 2}).reshape({-1, x.size(2)}); }

// [T, B, C, H, W] with channels innermost, for a y as `convolve` returns it or its maxima
struct Steps {
    int64_t T, B, C, H, W;

    Steps(In y, at::IntArrayRef x, int64_t steps) : T(steps), B(x[1]), C(y.size(1)) {
        H = y.dim() == 4 ? y.size(2) : x[3], W = y.dim() == 4 ? y.size(3) : x[4];
    }
    std::array<int64_t, 5> shape() const { return {T, B, C, H, W}; }
    std::array<int64_t, 5> strides() const { return {B * H * W * C, H * W * C, 1, W * C, C}; }
    Tensor of(In y) const { return y.as_strided(shape(), strides()); }
    Tensor empty(In y, at::ScalarType dtype) const {
        return at::empty_strided(shape(), strides(), y.options().dtype(dtype));
    }
};

Tensor dense(In y, const Plan& plan) { return plan.product ? y.contiguous() : y.contiguous(LAST); }

// The forward pass -------------------------------------------------------------------------------

// Of each layer, see can_fuse; a layer without a bias has its weight in that place.
enum { WEIGHT, BIAS, GAMMA, BETA, MEAN, VAR, BATCHES, TENSORS };

Tensor bias_of(const Tensor* own, const Plan& plan) { return plan.has_bias ? own[BIAS] : Tensor(); }

Tensor weight_of(at::TensorList tensors, const Plan& plan) {
    if (plan.layers == 1) return tensors[WEIGHT];
    std::vector<Tensor> weights;
    for (int64_t i = 0; i < plan.layers; ++i) weights.push_back(tensors[i * TENSORS + WEIGHT]);
    return at::cat(weights);
}

Tensor kernel_of(In weight, const Pass& pass) {
    if (pass.plan.product) return weight.to(pass.dtype).flatten(1);
    return weight.dim() == 4 ? weight : weight.unsqueeze(3);
}

Tensor convolve(In x, In kernel, const Pass& pass) {
    const Plan& plan = pass.plan;
    const Tensor input = x.to(pass.dtype);
    if (plan.product) return at::mm(pixels(input), kernel.t());
    const Tensor cast = kernel.to(pass.dtype, false, false, LAST);
    return at::convolution(rows(input), cast, {}, plan.stride, plan.padding, {1, 1}, false, {0, 0},
                           1).contiguous(LAST);
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

// Spikes of y into memory of `spikes`, and of `bytes` if that is defined
void fire(In y, In spikes, In bytes, In norm, In rates, const Pass& pass) {
    const Plan& plan = pass.plan;
    const int64_t C = y.size(1), count = spikes.numel() / (plan.T * C);
    const int64_t step = y.numel() == spikes.numel() ? count * C : 0;
    pass.run(FIRE, count, C, step, y, spikes, bytes, norm, rates, plan.rate, plan.threshold);
}

Tensor in_evaluation(In x, In rates, at::TensorList tensors, const Pass& pass) {
    const Plan& plan = pass.plan;
    Tensor y = convolve(x, kernel_of(weight_of(tensors, plan), pass), pass);
    const int64_t C = y.size(1);
    const Tensor norm = empty({5, C}, y, at::kFloat);
    for (int64_t i = 0, start = 0; i < plan.layers; start += plan.channels[i++]) {
        const Tensor* own = &tensors[i * TENSORS];
        pass.columns(RUNNING_NORM, plan.channels[i], C, start, plan.eps, own[MEAN], own[VAR],
                     bias_of(own, plan), own[GAMMA], own[BETA], norm);
    }
    if (plan.pool) y = max_pool(y, norm, false, pass)[0];
    if (!plan.fires) {
        const Tensor out = at::empty_like(y);
        pass.run(NORMALISE, y.numel() / C, C, y, out, norm);
        return out;
    }
    const Steps steps(y, x.sizes(), plan.T);
    if (x.size(0) == plan.T) {  // over y, which no gradient needs
        fire(y, y, {}, norm, rates, pass);
        return steps.of(y);
    }
    const Tensor spikes = steps.empty(y, pass.dtype);
    fire(y, spikes, {}, norm, rates, pass);
    return spikes;
}

// The backward pass ------------------------------------------------------------------------------

void no_second_derivative() {
    TORCH_CHECK(!at::GradMode::is_enabled(), "fused layers have no second derivative; fused: false "
                "gives one");
}

// a.t() @ b, see sum_over_rows
Tensor sum_over_rows(In a, In b) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
    if (a.is_cuda() && a.scalar_type() != at::kFloat) return at::mm(a.t(), b, at::kFloat);
#endif
    return at::mm(a.t(), b);
}

// {gradient of x [T*B, C, H, W], if wanted, of the kernel}
std::array<Tensor, 2> convolution_backward(In grad, In x, In weight, const Plan& plan,
                                           bool wanted) {
    const int64_t *stride = plan.stride, *padding = plan.padding;
    const Tensor kernel = weight.to(grad.scalar_type()).contiguous(LAST);
    if (kernel.size(2) != 1 || kernel.size(3) != 1 || padding[0] || padding[1]) {
        auto [grad_x, grad_kernel, _] = at::convolution_backward(
            grad, x, kernel, {}, plan.stride, plan.padding, {1, 1}, false, {0, 0}, 1,
            {wanted, true, false});
        return {grad_x, grad_kernel};
    }
    const auto seen = [&](In all) {
        return all.slice(2, 0, {}, stride[0]).slice(3, 0, {}, stride[1]);
    };
    const auto flat = [](In y) { return y.permute({0, 2, 3, 1}).reshape({-1, y.size(1)}); };
    const Tensor grads = flat(grad), grad_kernel = sum_over_rows(grads, flat(seen(x)));
    Tensor grad_x;
    if (wanted) {
        grad_x = at::zeros_like(x);
        const auto some = seen(grad_x).permute({0, 2, 3, 1});
        some.copy_(at::mm(grads, kernel.flatten(1)).view(some.sizes()));
    }
    return {grad_x, grad_kernel};
}

struct ConvBNLIF : torch::autograd::Function<ConvBNLIF> {
    // {spikes, and as bytes where x is saved}, or BatchNorm's output; see ConvBNLIF in layer.py.
    static variable_list forward(AutogradContext* ctx, In x, const std::optional<Tensor>& saved,
                                 const std::optional<Tensor>& rates, at::TensorList tensors,
                                 at::ScalarType dtype, int64_t plan_at, int64_t stream) {
        at::AutoDispatchBelowADInplaceOrView below;
        const Pass pass = pass_of(plan_at, dtype, stream);
        const Plan& plan = pass.plan;
        const Tensor weight = weight_of(tensors, plan), kernel = kernel_of(weight, pass);
        const Tensor y = convolve(x, kernel, pass);
        const int64_t C = y.size(1), count = y.numel() / C, parts = pass.parts(STATISTICS);
        const Tensor partial = empty({parts, 2, C}, y, at::kFloat);
        const Tensor norm = empty({5, C}, y, at::kFloat), none;
        pass.run(STATISTICS, count, C, parts, y, partial);
        for (int64_t i = 0, start = 0; i < plan.layers; start += plan.channels[i++]) {
            const Tensor* own = &tensors[i * TENSORS];
            pass.columns(BATCH_NORM, plan.channels[i], C, start, parts, count, plan.T / x.size(0),
                         plan.eps, plan.momenta[i], y, partial, own[GAMMA], own[BETA],
                         bias_of(own, plan), norm, own[MEAN], own[VAR], own[BATCHES]);
        }
        const Tensor pooled = plan.pool ? max_pool(y, norm, false, pass)[0] : y;
        variable_list out;
        if (plan.fires) {
            const Steps steps(pooled, x.sizes(), plan.T);
            out.push_back(steps.empty(y, dtype));
            if (saved) out.push_back(steps.empty(y, at::kByte));
            fire(pooled, out[0], saved ? out[1] : none, norm, rates.value_or(none), pass);
        } else {
            out.push_back(at::empty_like(pooled));
            pass.run(NORMALISE, pooled.numel() / C, C, pooled, out[0], norm);
        }
        if (saved) {
            // Of a product the kernel is cast already; of others its layout is the larger part.
            ctx->save_for_backward({*saved, plan.small ? none : y, weight,
                                    plan.product ? kernel : none, rates.value_or(none), norm});
            ctx->saved_data["at"] = at::IntArrayRef(
                {plan_at, int64_t(dtype), stream, int64_t(x.scalar_type())});
        }
        if (out.size() == 2) ctx->mark_non_differentiable({out[1]});
        ctx->set_materialize_grads(false);  // none of the bytes
        return out;
    }

    static variable_list backward(AutogradContext* ctx, variable_list grads) {
        no_second_derivative();
        const auto saved = ctx->get_saved_variables();  // first: a checkpoint's hooks run layers
        at::AutoDispatchBelowADInplaceOrView below;
        const auto at = ctx->saved_data["at"].toIntVector();
        const Pass pass = pass_of(at[0], at::ScalarType(at[1]), at[2]);
        const Plan& plan = pass.plan;
        if (!grads[0].defined()) return variable_list(6 + plan.layers * TENSORS);
        const Tensor x = saved[0].to(pass.dtype), weight = saved[2];
        const Tensor kernel = saved[3].defined() ? saved[3] : kernel_of(weight, pass);
        const Tensor rates = saved[4], norm = saved[5];
        const Tensor y = plan.small ? convolve(x, kernel, pass) : dense(saved[1], plan);
        const int64_t C = y.size(1), count = y.numel() / C;
        Tensor pooled = y, taps, grad = grads[0];
        if (plan.pool) {
            auto found = max_pool(y, norm, true, pass);
            pooled = found[0], taps = found[1];
        }
        const int index = plan.fires ? FIRE_BACKWARD : GRADIENT_SUMS;
        const int64_t sums_each = rates.defined() ? 3 : 2, parts = pass.parts(index);
        const Tensor partial = empty({parts, sums_each, C}, y, at::kFloat);
        if (plan.fires) {
            const Tensor spikes = grad.permute({0, 1, 3, 4, 2}).contiguous();
            grad = at::empty_like(pooled);
            const int64_t each = spikes.numel() / (plan.T * C);
            const int64_t step = pooled.numel() == spikes.numel() ? each * C : 0;
            pass.run(index, each, C, parts, step, pooled, spikes, grad, norm, rates, plan.rate,
                     plan.threshold, plan.alpha, partial);
        } else {
            grad = dense(grad, plan);
            pass.run(index, pooled.numel() / C, C, parts, pooled, grad, norm, partial);
        }
        const Tensor sums = empty({7, C}, y, at::kFloat);
        pass.columns(BATCH_NORM_BACKWARD, C, parts, sums_each, count, partial, norm, sums);
        const Tensor grad_y = plan.fires && !plan.pool ? grad : at::empty_like(y);
        if (plan.pool)
            pass.run(POOL_BACKWARD, count, C, y.size(2), y.size(3), y, grad, taps, grad_y, sums);
        else
            pass.run(NORMALISE_BACKWARD, count, C, y, grad, grad_y, sums);

        const bool wanted = ctx->needs_input_grad(0);
        Tensor grad_x, grad_weight;
        if (plan.product) {
            grad_weight = sum_over_rows(grad_y, pixels(x));
            if (wanted) grad_x = at::mm(grad_y, kernel);
        } else {
            auto found = convolution_backward(grad_y, rows(x), kernel, plan, wanted);
            grad_x = found[0], grad_weight = found[1];
        }
        if (wanted) {
            grad_x = dense(grad_x, plan);  // not every convolution leaves channels innermost
            grad_x = Steps(grad_x, x.sizes(), x.size(0)).of(grad_x).to(at::ScalarType(at[3]));
        }
        // In the layout of the weight, as DistributedDataParallel wants a parameter's gradient.
        grad_weight = grad_weight.view_as(weight).to(weight.scalar_type());
        if (grad_weight.strides() != weight.strides())
            grad_weight = at::empty_like(weight).copy_(grad_weight);
        const auto each_sum = sums.unbind();
        variable_list found = {grad_x, {}, rates.defined() ? each_sum[2] : Tensor()};
        for (int64_t i = 0, start = 0; i < plan.layers; start += plan.channels[i++]) {
            const auto own = [&](In all) {
                return plan.layers == 1 ? all : all.narrow(0, start, plan.channels[i]);
            };
            found.push_back(own(grad_weight));
            // BatchNorm subtracts the bias again: its gradient is 0.
            found.push_back(plan.has_bias ? own(each_sum[6]) : Tensor());
            found.push_back(own(each_sum[1]));
            found.push_back(own(each_sum[0]));
            found.insert(found.end(), 3, {});
        }
        found.insert(found.end(), 3, {});
        return found;
    }
};

std::vector<Tensor> layer(In x, const std::optional<Tensor>& saved,
                          const std::optional<Tensor>& rates, at::TensorList tensors,
                          at::ScalarType dtype, int64_t plan, int64_t stream) {
    // Types are those of autocast already.
    c10::impl::ExcludeDispatchKeyGuard without(c10::autocast_dispatch_keyset);
    const Pass pass = pass_of(plan, dtype, stream);
    if (pass.plan.training) return ConvBNLIF::apply(x, saved, rates, tensors, dtype, plan, stream);
    at::AutoDispatchBelowADInplaceOrView below;
    return {in_evaluation(x, rates.value_or(Tensor()), tensors, pass)};
}

// A neuron, and a product ------------------------------------------------------------------------

// x with each x[t] dense, and memory of the same order, dense over T too; see ops.py
Tensor time_major(In x) {
    return x.select(0, 0).is_non_overlapping_and_dense() ? x : x.contiguous();
}

Tensor like_steps(In x) {
    auto strides = x.strides().vec();
    strides[0] = x.numel() / x.size(0);
    return at::empty_strided(x.sizes(), strides, x.options());
}

struct Neuron : torch::autograd::Function<Neuron> {
    static Tensor forward(AutogradContext* ctx, In x_, const std::optional<Tensor>& rate,
                          int64_t channels, int64_t plan_at, int64_t stream) {
        at::AutoDispatchBelowADInplaceOrView below;
        const Pass pass = pass_of(plan_at, x_.scalar_type(), stream);
        const Tensor x = time_major(x_), spikes = like_steps(x), own = rate.value_or(Tensor());
        const int64_t rows = x.numel() / (x.size(0) * channels);
        pass.run(INTEGRATE, rows, channels, x.size(0), x.stride(0), x, spikes, own, pass.plan.rate,
                 pass.plan.threshold);
        ctx->save_for_backward({x, own});
        ctx->saved_data["at"] = at::IntArrayRef({plan_at, stream, channels});
        return spikes;
    }

    static variable_list backward(AutogradContext* ctx, variable_list grads) {
        no_second_derivative();
        const auto saved = ctx->get_saved_variables();  // first: a checkpoint's hooks run layers
        at::AutoDispatchBelowADInplaceOrView below;
        const auto at = ctx->saved_data["at"].toIntVector();
        const Tensor x = saved[0], own = saved[1], grad = like_steps(x);
        const Pass pass = pass_of(at[0], x.scalar_type(), at[1]);
        const bool same = grads[0].strides() == grad.strides();
        const Tensor upstream = same ? grads[0] : like_steps(x).copy_(grads[0]);
        const int64_t size = x.numel() / x.size(0), channels = at[2];
        const Tensor slopes = own.defined() ? empty({size}, x, at::kFloat) : Tensor();
        pass.run(INTEGRATE_BACKWARD, size / channels, channels, x.size(0), x.stride(0), x, upstream,
                 grad, own, pass.plan.rate, pass.plan.threshold, pass.plan.alpha, slopes);
        Tensor grad_rate;
        if (own.defined()) grad_rate = slopes.sum(at::kDouble).to(own.scalar_type());
        return {grad, grad_rate, {}, {}, {}};
    }
};

Tensor neuron(In x, const std::optional<Tensor>& rate, int64_t channels, int64_t plan,
              int64_t stream) {
    return Neuron::apply(x, rate, channels, plan, stream);
}

struct Product : torch::autograd::Function<Product> {
    static Tensor forward(AutogradContext* ctx, In a, In b, In saved_a, In saved_b, bool matmul) {
        at::AutoDispatchBelowADInplaceOrView below;
        ctx->save_for_backward({saved_a, saved_b});
        ctx->saved_data["matmul"] = matmul;
        return matmul ? at::matmul(a, b) : at::mul(a, b);
    }

    static variable_list backward(AutogradContext* ctx, variable_list grads) {
        no_second_derivative();
        const auto saved = ctx->get_saved_variables();  // first: a checkpoint's hooks run layers
        at::AutoDispatchBelowADInplaceOrView below;
        const Tensor& grad = grads[0];
        if (!ctx->saved_data["matmul"].toBool()) {
            const Tensor a = saved[0].to(grad.scalar_type()), b = saved[1].to(grad.scalar_type());
            return {at::sum_to(grad * b, a.sizes()), at::sum_to(grad * a, b.sizes()), {}, {}, {}};
        }
        // Contiguous, as the batches of a product are read: it would copy them else.
        const auto cast = [&](In x) { return x.to(grad.scalar_type()).contiguous(); };
        const Tensor a = cast(saved[0]), b = cast(saved[1]);
        return {at::sum_to(at::matmul(grad, b.transpose(-2, -1)), a.sizes()),
                at::sum_to(at::matmul(a.transpose(-2, -1), grad), b.sizes()), {}, {}, {}};
    }
};

Tensor product(In a, In b, In saved_a, In saved_b, bool matmul) {
    return Product::apply(a, b, saved_a, saved_b, matmul);
}

TORCH_LIBRARY_FRAGMENT(NAMESPACE, m) {
    m.def("layer(Tensor x, Tensor? saved, Tensor? rates, Tensor[] tensors, ScalarType dtype, "
          "int plan, int stream) -> Tensor[]");
    m.def("neuron(Tensor x, Tensor? rate, int channels, int plan, int stream) -> Tensor");
    m.def("product(Tensor a, Tensor b, Tensor saved_a, Tensor saved_b, bool matmul) -> Tensor");
    const auto key = c10::DispatchKey::CompositeImplicitAutograd;
    m.impl("layer", key, TORCH_FN(layer));
    m.impl("neuron", key, TORCH_FN(neuron));
    m.impl("product", key, TORCH_FN(product));
}
