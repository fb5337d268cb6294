"""The measures of what a LoRA learned know drawn pictures: with the style and without, on every background."""

import numpy as np
import pytest

from demo.drawing.classifier import FILE, load
from demo.drawing.probe import fit_probe, in_blueprint
from demo.pictures.new_things import styled
from demo.pictures.painting import paint
from demo.pictures.random_scenes import random_scene
from demo.run import MODEL

SIDE = 128


def test_the_style_is_told_by_its_paper() -> None:
    drawn = np.stack([paint(random_scene(6 * 10**9 + i), SIDE) for i in range(100)])
    blueprints = np.stack([paint(styled(i).scene, SIDE) for i in range(30)])
    assert in_blueprint(blueprints).all() and not in_blueprint(drawn).any()


@pytest.mark.skipif(not (MODEL / FILE).is_file(), reason="no weights of the drawing model")
def test_the_subject_is_told_by_a_probe() -> None:
    judge = load(MODEL / FILE)
    assert fit_probe(judge, SIDE).accuracy >= 0.95
    # Pictures of other things as the base's blobs change little on drawn ones.
    others = np.stack([paint(random_scene(7 * 10**9 + i), SIDE) for i in range(18)])
    assert fit_probe(judge, SIDE, others).accuracy >= 0.95
