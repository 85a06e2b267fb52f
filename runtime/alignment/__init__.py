"""Estimating how two cameras lie to each other: from pictures of any scene, or of a target."""
