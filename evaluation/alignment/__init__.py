"""Scores of alignment suites: does a model tell a text that describes an image from one that does not?"""
