"""SIMLA for NLVR2: whether a sentence is true of two images."""

from simla.models.ve import SIMLAVE


class SIMLANLVR(SIMLAVE):
    """The model of visual entailment with two images, of which the text layers read one after the other, two
    classes and an image batch (2B, 3, R, R), all first images first.
    """

    num_classes = 2
    two_images = True
