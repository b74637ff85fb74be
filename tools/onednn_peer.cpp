/* Batch normalization by oneDNN behind functions of C, for bench_kernels.py, which builds this file where the library and its headers are.
 */
#include <omp.h>
#include <oneapi/dnnl/dnnl.hpp>

#include <memory>
#include <unordered_map>

using dnnl::memory;

namespace {

struct Peer {
    dnnl::engine engine{dnnl::engine::kind::cpu, 0};
    dnnl::stream stream{engine};
    memory x, dy, out, weight, bias, mean, var, batch_mean, batch_var, dweight, dbias;
    memory plain_out; /* of the caller; out itself where the layout is not blocked */
    dnnl::batch_normalization_forward train, infer;
    dnnl::batch_normalization_backward backward;
    int threads;
};

/* The blocks that oneDNN's own convolutions have: as many channels as a vector has float32. */
memory::format_tag blocks() {
    const int isa = static_cast<int>(dnnl::get_effective_cpu_isa()), avx512 = static_cast<int>(dnnl::cpu_isa::avx512_core);
    return (isa & avx512) == avx512 ? memory::format_tag::nChw16c : memory::format_tag::nChw8c;
}

void reorder(Peer &peer, memory &from, memory &to) {
    dnnl::reorder(from, to).execute(peer.stream, from, to);
    peer.stream.wait();
}

} // namespace

extern "C" {

/* layout: 0 NCHW, 1 NHWC, 2 blocks of 16 or 8 channels; is_bfloat16: of x, dy and out. `plain` are x, dy and out of the caller, NCHW where
 * the layout is 2, and `blocked` is room for their blocks, channels rounded up to 16. `values` has seven vectors of C floats: weight, bias,
 * mean, var, the mean and the variance of the batch, and room for a gradient. NULL where oneDNN refuses. */
void *peer_open(int layout, int is_bfloat16, int threads, const int64_t *shape, void *const *plain, void *const *blocked,
                float *values) try {
    using tag = memory::format_tag;
    auto peer = std::make_unique<Peer>();
    omp_set_num_threads(threads);
    peer->threads = threads;
    const memory::dims dims(shape, shape + 4);
    const auto type = is_bfloat16 ? memory::data_type::bf16 : memory::data_type::f32;
    const tag tags[] = {tag::nchw, tag::nhwc, blocks()};
    const memory::desc tensor(dims, type, tags[layout]), given(dims, type, layout == 1 ? tag::nhwc : tag::nchw);
    const memory::desc vector({shape[1]}, memory::data_type::f32, tag::a);
    memory *const own[] = {&peer->x, &peer->dy, &peer->out};
    for (int i = 0; i < 3; i++) {
        memory of_caller(given, peer->engine, plain[i]);
        *own[i] = layout == 2 ? memory(tensor, peer->engine, blocked[i]) : of_caller;
        if (layout == 2)
            reorder(*peer, of_caller, *own[i]);
    }
    peer->plain_out = memory(given, peer->engine, plain[2]);
    memory *const vectors[] = {&peer->weight,     &peer->bias,      &peer->mean,    &peer->var,
                               &peer->batch_mean, &peer->batch_var, &peer->dweight, &peer->dbias};
    for (int i = 0; i < 8; i++)
        *vectors[i] = i < 7 ? memory(vector, peer->engine, values + i * shape[1]) : memory(vector, peer->engine);

    using flags = dnnl::normalization_flags;
    using dnnl::prop_kind;
    const auto affine = flags::use_scale | flags::use_shift;
    const dnnl::batch_normalization_forward::primitive_desc train(peer->engine, prop_kind::forward_training, tensor, tensor, 1e-5f, affine);
    const dnnl::batch_normalization_forward::primitive_desc infer(peer->engine, prop_kind::forward_inference, tensor, tensor, 1e-5f,
                                                                  affine | flags::use_global_stats);
    peer->train = dnnl::batch_normalization_forward(train);
    peer->infer = dnnl::batch_normalization_forward(infer);
    peer->backward = dnnl::batch_normalization_backward(dnnl::batch_normalization_backward::primitive_desc(
        peer->engine, prop_kind::backward, tensor, tensor, tensor, 1e-5f, affine, train));
    return peer.release();
} catch (const dnnl::error &) {
    return nullptr;
}

/* operation: 0 training, 1 inference, 2 backward */
void peer_run(void *handle, int operation) {
    Peer &peer = *static_cast<Peer *>(handle);
    omp_set_num_threads(peer.threads);
    std::unordered_map<int, memory> arguments{
        {DNNL_ARG_SRC, peer.x},      {DNNL_ARG_DST, peer.out},         {DNNL_ARG_SCALE, peer.weight},
        {DNNL_ARG_SHIFT, peer.bias}, {DNNL_ARG_MEAN, peer.batch_mean}, {DNNL_ARG_VARIANCE, peer.batch_var},
    };
    if (operation == 0)
        peer.train.execute(peer.stream, arguments);
    else if (operation == 1) {
        arguments[DNNL_ARG_MEAN] = peer.mean;
        arguments[DNNL_ARG_VARIANCE] = peer.var;
        peer.infer.execute(peer.stream, arguments);
    } else {
        arguments.erase(DNNL_ARG_DST);
        arguments.erase(DNNL_ARG_SHIFT);
        arguments[DNNL_ARG_DIFF_DST] = peer.dy;
        arguments[DNNL_ARG_DIFF_SRC] = peer.out;
        arguments[DNNL_ARG_DIFF_SCALE] = peer.dweight;
        arguments[DNNL_ARG_DIFF_SHIFT] = peer.dbias;
        peer.backward.execute(peer.stream, arguments);
    }
    peer.stream.wait();
}

/* Brings the result of the last run to the memory of the caller. */
void peer_fetch(void *handle) {
    Peer &peer = *static_cast<Peer *>(handle);
    if (peer.out != peer.plain_out)
        reorder(peer, peer.out, peer.plain_out);
}

void peer_close(void *handle) {
    delete static_cast<Peer *>(handle);
}
}
