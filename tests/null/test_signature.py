"""Every launch gives its kernel exactly what the kernel takes; no Triton is asked."""

import subprocess
import sys
from dataclasses import replace

import pytest

import graphnet as gn
from graphnet.api import lower
from graphnet.errors import CompileError
from graphnet.lowering.build.build import _config
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.launch.signature import Signature, signature_of
from graphnet.lowering.launch.steps import bind
from graphnet.lowering.plan.plan import make_plan
from tests.case import Case, attrs, f
from tests.cases import CASES
from tests.poisoned import graph_of

TRAIN = {
    "loss": gn.CrossEntropyLoss(),
    "optimizer": gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4),
}
MODELS = ("lenet5", "caffe_lenet", "alexnet", "alexnet_2012", "caffenet", "alexnet_owt")
AVERAGE = Case("avgpool2d", (f(2, 3, 6, 6),), None, attrs("avgpool2d", kernel=(2, 2)))


def launches(case):
    return make_plan(graph_of(case), "cuda").launches


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_every_launch_of_every_case(case):
    for s in launches(case):
        _, constants, _ = bind(s)
        assert len(constants) == len(s.constants)  # none twice


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_every_launch_of_the_models(model, precision):
    net = gn.models.get(model)
    for how in ({}, {"loss": TRAIN["loss"]}, TRAIN, {**TRAIN, "clip_norm": 1.0, "accumulate": 2}):
        low = lower(net, (32, *net.input_shape), target="cuda", precision=precision, **how)
        assert low.plan.launches
        for s in low.plan.launches:
            bind(s)


def test_a_constant_too_many_one_too_few_and_a_pointer_too_few_are_refused():
    (launch,) = launches(AVERAGE)
    constants = dict(launch.constants)

    def bound(args=launch.args, **changes):
        given = {k: v for k, v in {**constants, **changes}.items() if v != "gone"}
        return bind(replace(launch, args=args, constants=tuple(given.items())))

    bound()
    with pytest.raises(CompileError, match="avgpool2d cannot be launched so: it has no constant D"):
        bound(DH=1, DW=1)
    with pytest.raises(CompileError, match="it is not given BLOCK, KH"):
        bound(KH="gone", BLOCK="gone")
    with pytest.raises(CompileError, match=r"it takes 2 arguments \(x, args\), not 1"):
        bound(args=launch.args[:1])
    with pytest.raises(CompileError, match="has no kernel avgpool3d"):
        bind(replace(launch, kernel="avgpool3d"))


def test_what_the_file_says_is_the_signature():
    assert signature_of("graphnet.kernels.common", "maximum_nan").constants == ()
    found = signature_of("graphnet.kernels.pool", "adaptive_avgpool2d")
    assert found.pointers == ("x", "args") and found.optional == frozenset()
    assert found.constants[:3] == ("N", "C", "H") and found.constants[-1] == "EPILOGUE"
    free = Signature(("x",), ("N", "M"), frozenset({"M"}))
    assert free.mismatch(1, ["N"]) is None
    assert free.mismatch(1, ["M"]) == "it is not given N"


def test_no_triton_is_imported():
    code = (
        "import sys, graphnet.ops\n"
        "from graphnet.lowering.launch.signature import signature_of\n"
        "signature_of('graphnet.kernels.conv', 'conv2d_forward')\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_average_has_no_dilation():
    with pytest.raises(gn.errors.UnsupportedOpError, match=r"no dilation, not \(2, 1\)"):
        attrs("avgpool2d", kernel=(2, 2), dilation=(2, 1))


def test_the_report_names_all_that_was_chosen():
    net = gn.models.alexnet()
    with forced("lrn_grad+maxpool2d_grad", variant="pixels"):
        low = lower(net, (128, 3, 227, 227), target="cuda", precision="bf16", **TRAIN)
    reported = {name for s in low.plan.launches for name in _config(s)}
    assert {"BM", "BN", "BK", "BT", "BP", "BC", "PROGRAMS", "ROWS", "BLOCK"} <= reported
    assert not {"BETA", "N", "C", "KH"} & reported
    for s in low.plan.launches:
        assert all(isinstance(v, int) for v in _config(s).values())
