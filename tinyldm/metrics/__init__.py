"""What is measured of pictures: does a picture show what its caption says?"""
